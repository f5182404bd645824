"""The pages of all results."""

import json
import re
import shutil
from importlib.metadata import version

import pytest

from benchmarks import pages, report
from benchmarks.paper.__main__ import EXPERIMENTS
from processes import python


def test_the_pages_are_what_the_result_files_say():
    there = {path.name: path.read_text() for path in pages.RESULTS.glob("*.md")}
    assert report.index_and_pages(pages.RESULTS) == there, "run python -m benchmarks.report"


def test_every_result_and_plot_stands_on_one_short_page():
    index, *texts = report.index_and_pages(pages.RESULTS).values()
    assert all(len(text.encode()) <= 12_000 for text in (index, *texts))
    for path in pages.RESULTS.glob("*.json"):
        assert sum(text.count(f"\n\n`{path.name}`: `") for text in texts) == 1
        assert index.count(f"[{path.stem}](") == 1
    for path in pages.RESULTS.glob("*.png"):
        assert sum(text.count(f"]({path.name})") for text in texts) == 1


def test_the_index_links_headings_that_are_there():
    made = report.index_and_pages(pages.RESULTS)
    links = re.findall(r"\]\(([\w.]+)#([\w-]+)\)", made[report.INDEX])
    assert len(links) == len(list(pages.RESULTS.glob("*.json")))
    for page, anchor in links:
        headings = re.findall(r"^## (.*)$", made[page], re.MULTILINE)
        assert anchor in [heading.lower().replace(".", "") for heading in headings]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Copies of the result files, and pages with places for their tables."""
    copied = tmp_path / "results"
    copied.mkdir()
    for path in pages.RESULTS.glob("*.json"):
        shutil.copy(path, copied)
    tables = {tmp_path / page.name: tables for page, tables in pages.TABLES.items()}
    for page, names in tables.items():
        page.write_text("".join(f"<!-- {name} -->\nstale text\n<!-- end -->\n" for name in names))
    monkeypatch.setattr(pages, "TABLES", tables)
    monkeypatch.setattr(pages, "RESULTS", copied)
    return copied


def test_they_are_written_with_the_tables_of_all_pages(results):
    for _ in range(2):
        assert report.main([]) == 0
        written = "".join(page.read_text() for page in pages.TABLES)
        assert "stale text" not in written and pages.made_by("paper_flops.json") in written
        there = {path.name: path.read_text() for path in results.glob("*.md")}
        assert there == report.index_and_pages(results)


def test_a_page_without_a_result_is_named(results, capsys):
    (results / "old.md").write_text("numbers of last year")
    assert report.main([]) == 2
    assert capsys.readouterr().err == f"benchmarks.report: {results / 'old.md'} is a page without a result; delete it\n"


@pytest.mark.parametrize(
    ("name", "others", "said"),
    [("unheard_of", {}, "no page"), ("host", {"new.md": ("New", {"hos?": ""})}, "checks.md and new.md")],
)
def test_a_result_belongs_to_one_page(name, others, said, results, monkeypatch, capsys):
    monkeypatch.setattr(report, "PAGES", report.PAGES | others)
    (results / f"{name}.json").write_text((results / "host.json").read_text())
    assert report.main([]) == 2
    told = f"{results / name}.json belongs to {said}; give it one page in PAGES of benchmarks/report.py"
    assert capsys.readouterr().err == f"benchmarks.report: {told}\n"
    assert not list(results.glob("*.md"))


def test_where_merging_pays_is_told_cell_by_cell():
    gpu, cpu = (json.loads((pages.RESULTS / f"{name}.json").read_text()) for name in ("h200_engine", "cpu_bench"))
    lines = pages.pays_table(gpu, cpu).splitlines()
    measured = {(row["model"], row["batch"]) for row in gpu["stages"]["engine"]["rows"]}
    assert len(lines) == 4 + len(measured) + len(cpu["cases"])
    for row in gpu["stages"]["engine"]["rows"]:
        if row["name"] == "ATM image" and not row["session"]:
            cells, ratio = (row["model"], str(row["batch"])), row["of_timm_graph"]
            on_gpu = (line.split(" | ") for line in lines[3 : 3 + len(measured)])
            (told,) = (line for line in on_gpu if (line[0][2:], line[2]) == cells)
            assert told[-1] == (f"{ratio:.2f} |" if ratio >= 1 else f"**{ratio:.2f}** |")
    assert any(line.startswith("| DINOv2-S | 518 | 8 |") for line in lines)


RUN = """
import sys
from pathlib import Path
from benchmarks.integration import main
sys.exit(main(Path(sys.argv[1]), Path(sys.argv[1], "shown.json")))
"""
MARKED = """
import pytest
@pytest.mark.works_with("torch", "sums")
def test_sums(): assert 1 + 1 == 2
def test_no_mark(): assert False
"""
SKIPPED = """
@pytest.mark.works_with("torch", "nothing")
def test_nothing(): pytest.skip("not here")
"""


@pytest.mark.parametrize(("more", "code"), [("", 0), (SKIPPED, 1)], ids=["passed", "skipped"])
def test_what_works_with_others_is_written_if_all_of_it_was_shown(more, code, tmp_path):
    (tmp_path / "integration").mkdir()
    (tmp_path / "integration" / "test_it.py").write_text(MARKED + more)
    (tmp_path / "run.py").write_text(RUN)
    done = python(tmp_path / "run.py", tmp_path)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.splitlines()[-1].endswith("test_it.py::test_nothing")
        assert not (tmp_path / "shown.json").exists()
    else:
        rows = json.loads((tmp_path / "shown.json").read_text())["rows"]
        assert rows == [{"library": "torch", "version": version("torch"), "what": "sums"}]


def test_a_page_without_a_place_for_its_table_is_named(tmp_path, monkeypatch):
    page = tmp_path / "guide.md"
    page.write_text("no table")
    monkeypatch.setattr(pages, "TABLES", {page: pages.TABLES[pages.BACKBONES]})
    with pytest.raises(ValueError, match=r"guide\.md has no place for the table 'flops'"):
        pages.filled()


@pytest.mark.parametrize("text", ['{"rows": []}', "[]", "{", '{"environment": {"commit": "x"}}', "ROW"])
def test_a_file_of_another_version_is_named(text, tmp_path):
    path = tmp_path / f"digits_{next(iter(EXPERIMENTS))}.json"
    made = json.loads((pages.RESULTS / "digits_table1.json").read_text())
    path.write_text(json.dumps(made | {"rows": ["x"]}) if text == "ROW" else text)
    with pytest.raises(ValueError, match=f"^{path} is not a result of this version"):
        report.index_and_pages(tmp_path)


def test_it_takes_no_options(capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main(["--out", "elsewhere"])
    assert capsys.readouterr().err.startswith("python -m benchmarks.report: unrecognized arguments: --out elsewhere;")


def test_a_table_without_its_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    with pytest.raises(
        FileNotFoundError, match="paper_flops.json is missing, README or a page of docs has a table of it; measure it"
    ):
        pages.load("paper_flops.json")


def test_an_experiment_is_found_by_its_name(tmp_path):
    about = {
        "commit": "0123456789",
        "dirty": False,
        "command": "python",
        "torch": "2",
        "timm": "1",
        "cpu": "a processor",
    }
    document = {"environment": about | {"gpu": None, "utc": "now"}, "settings": {"blocks": [3]}, "rows": []}
    document["rows"].append({"title": "image 0, ATM", "gflops": 0.25, "gflops_all_tokens_last": 0.26, "left": [7]})
    (tmp_path / "vit_small_patch14_dinov2_figure7.json").write_text(json.dumps(document))
    page = report.index_and_pages(tmp_path)["dinov2.md"]
    assert "\nPictures of merged tokens" in page and "| image 0, ATM | 0.250 | 0.260 | 7 |" in page
    assert "a processor, torch 2, timm 1, commit 0123456, now" in page and "![" not in page


def test_a_table_is_of_the_file_beside_it(tmp_path):
    document = json.loads((pages.RESULTS / "paper_flops.json").read_text())
    document["models"][0]["parameters"] = 1_230_000
    (tmp_path / "paper_flops.json").write_text(json.dumps(document))
    assert "| 1.23 (5.72) |" in report.index_and_pages(tmp_path)["checks.md"]


def test_an_unfinished_file_is_shown_as_far_as_it_goes(tmp_path):
    document = json.loads((pages.RESULTS / "digits_figure4.json").read_text())
    (tmp_path / "digits_figure4.json").write_text(json.dumps(document | {"rows": document["rows"][:-1]}))
    assert report.index_and_pages(tmp_path)["digits.md"].count("not measured yet") == 1

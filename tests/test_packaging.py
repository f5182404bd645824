"""A wheel built from this checkout works when installed elsewhere and brings one top-level name."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, because building leaves folders behind."""
    folder = tmp_path_factory.mktemp("build")
    skipped = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder / "source", ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", str(folder)], cwd=folder / "source", check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True)
    return target


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"atm_triton"}
    assert {
        "atm_triton/kernels/__init__.py",
        "atm_triton/digits/vit_digits_patch8_112.safetensors",
        "atm_triton/digits/vit_digits_patch8_112.atm.json",
        "atm_triton/digits/source.safetensors",
        "atm_triton/operating_points.json",
        "atm_triton/py.typed",
    } <= set(names)
    assert wheel.stat().st_size < 5e6


CODE = """
import atm_triton, atm_triton.kernels, atm_triton.digits.model, atm_triton.models, sys
from pathlib import Path
site = Path(sys.argv[1])
for module in (atm_triton, atm_triton.kernels, atm_triton.digits.model, atm_triton.models):
    assert site in Path(module.__file__).parents, module.__file__
assert list(atm_triton.__path__) == [str(site / "atm_triton")]
assert atm_triton.ATMConfig.preset("DeiT-S", max_gflops=3.3).alpha == 0.99
from atm_triton.cli import main
sys.exit(main(["eval", "--limit", "16"]))
"""


def test_it_works_where_it_is_installed(site, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE, str(site)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "% of the MACs saved" in done.stdout


def test_a_checkout_holds_no_more_modules_than_a_wheel():
    """A folder beside the package must not be importable from it: such an import would fail once it is installed."""
    code = "from importlib.util import find_spec as f; print(*(f(f'atm_triton.{n}') for n in %r))"
    names = ["report", "photos", "gpu", "tests", "benchmarks"]
    done = subprocess.run([sys.executable, "-c", code % names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["None"] * len(names), done.stdout + done.stderr


def test_a_checkout_runs_its_own_kernels(tmp_path):
    """This holds even if another version is installed."""
    for folder in ("atm_triton", "kernels", "benchmarks/digits"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    code = "from atm_triton import digits, kernels; print(digits.__file__, kernels.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    own = [str(tmp_path / folder / "__init__.py") for folder in ("benchmarks/digits", "kernels")]
    assert done.returncode == 0 and done.stdout.split() == own, done.stdout + done.stderr


ASKED_FOR = """
from importlib import import_module
assert import_module("kernels").__version__ == VERSION  # as libraries do that look for what is installed
try:
    from kernels import match
except ImportError as error:
    assert "cannot import name 'match' from 'kernels'" in str(error)
else:
    assert match == "another's"
try:
    import kernels.merge
except ModuleNotFoundError as error:
    assert error.name == "kernels.merge"
"""


def asked_for(version, *path):
    """Run ``ASKED_FOR`` in the checkout with these folders on the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    code = ASKED_FOR.replace("VERSION", repr(version))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kernels_give_way_to_a_distribution_of_their_name(tmp_path):
    """It is found behind another checkout, and when folders are on the path twice."""
    shutil.copytree(ROOT / "kernels", tmp_path / "checkout" / "kernels")
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("__version__, match = '0.17.3', \"another's\"\n")
    asked_for("0.17.3", tmp_path / "site")
    asked_for("0.17.3", *(tmp_path / "checkout", ROOT) * 2, tmp_path / "site")


def test_without_one_there_is_nothing_under_their_name(tmp_path):
    (tmp_path / "kernels").mkdir()
    asked_for("0", tmp_path)
    done = subprocess.run([sys.executable, "-c", "import kernels; kernels.match"], cwd=ROOT, capture_output=True)
    assert done.returncode == 1 and b"import atm_triton.kernels" in done.stderr


def test_no_import_runs_upward():
    """The layers of CONTRIBUTING: a file imports only from its own or a lower layer."""
    layers = [
        {"packed", "graphs", "operating_points", "measure.provenance", "measure.distributed", "calibration.errors"},
        {"reference", "record"},
        {"ops", "config"},
        {"block"},
        {"stage", "captured"},
        {"engine"},
        {"transformer"},
        {"patch", "flops"},
        {"summary", "measure.comparison", "measure.models"},
        {"measure.evaluate", "measure.images", "measure.configurations", "measure.visualize"},
        {"measure.throughput"},
        {"training.recipe", "training.folder"},
        {"training.images", "training.method"},
        {"training.finetune"},
        {"calibration.costs", "calibration.progress", "calibration.resume"},
        {"calibration.measuring"},
        {"calibration.fitting"},
        {"calibration.search"},
        {"calibration.calibrate"},
        {"cli.bad_input"},
        {"cli.options", "cli.report", "cli.finetuning"},
        {"cli.commands"},
        {"__main__"},
    ]
    level = {name: index for index, names in enumerate(layers) for name in names}
    package = ROOT / "atm_triton"
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    files = {name: path for name, path in files.items() if "__init__" not in name and not name.startswith("models.")}
    assert files.keys() == level.keys()
    for name, path in files.items():
        for other in _imported(path) & level.keys():
            assert level[other] < level[name], f"{name} imports {other}"


def test_the_models_know_timm_alone():
    for path in (ROOT / "atm_triton" / "models").glob("*.py"):
        imported = re.findall(r"^(?:from|import) (atm_triton\S*)", path.read_text(), re.MULTILINE)
        assert all(name.startswith("atm_triton.models") for name in imported), path


def _imported(path):
    """The modules of the package that a file imports: "measure.images" for ``from atm_triton.measure.images import x``
    and for ``from atm_triton.measure import images``."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    whole = [f"{node.module}.{part}" for node in nodes for part in ("", *(alias.name for alias in node.names))]
    return {name.rstrip(".").removeprefix("atm_triton.") for name in whole if name.startswith("atm_triton.")}


def test_the_reference_knows_no_device_and_no_model():
    text = (ROOT / "atm_triton" / "reference.py").read_text()
    assert "cuda" not in text and "timm" not in text
    assert re.findall(r"(?:from|import) (atm_triton\S*)", text) == ["atm_triton.packed"]

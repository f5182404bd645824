"""The page site: README, CONTRIBUTING, CHANGELOG and the results become pages beside those of this folder.

Links between them are those of the repository; here they are turned to where the pages lie on the site.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "index.md", content=_moved((ROOT / "README.md").read_text(), "")))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md"):
        files.append(File.generated(config, name, content=_moved((ROOT / name).read_text(), "")))
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return markdown if page.file.generated_by else _moved(markdown, "../")


def _moved(text: str, root: str) -> str:
    """The links of a page from which the repository's root is ``root``."""
    text = re.sub(rf"\]\({re.escape(root)}benchmarks/results/", "](results/", text)
    text = re.sub(rf"\]\({re.escape(root)}(CONTRIBUTING|CHANGELOG|CODE_OF_CONDUCT)", r"](\1", text)
    return re.sub(r"\]\(docs/", "](", text) if root == "" else text

"""The pages under docs/ and the README: their links lead somewhere, and what is written by a script is as the script writes it."""

import importlib.util
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_the_page_of_the_tree_names_every_file():
    spec = importlib.util.spec_from_file_location("write_tree_page", ROOT / "docs/write_tree_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/tree.md").read_text() == module.page(), "Run docs/write_tree_page.py"
    files = [
        file
        for folder in ("modeling_alignvlm", "hub_upload", "alignvlm", "training")
        for file in (ROOT / folder).rglob("*.py")
    ]
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        if file.name != "__init__.py" and "/metrics/" not in path:
            assert f"(../{path})" in module.page()
            assert module.purpose(file), f"{path} has no docstring"

"""Writes docs/tree.md: every file of the package with what it is for, as its docstring says.

python docs/write_tree_page.py
"""

import ast
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# In the order in which they may import each other: each only from those before it.
FOLDERS = (
    "modeling_alignvlm",
    "hub_upload",
    "alignvlm/data",
    "alignvlm/rows",
    "alignvlm/evaluation",
    "alignvlm/evaluation/lmms_tasks",
    "alignvlm/stages",
    "alignvlm/export",
    "alignvlm/tools",
    "alignvlm/tools/report",
    "alignvlm/quickstart",
    "alignvlm",
    "training",
    "demo",
    "benchmarks",
)
HEAD = """\
# Where everything is

What one trains with, from the ground up: a folder imports only from those above it (`tests/test_layout.py`). The first two have no
idea of the rest: `modeling_alignvlm` travels with every checkpoint, `hub_upload` needs a checkpoint and nothing else. A record goes
from `data` (a row of a data set to images and conversations) through `rows` (conversations to the tokens of a batch) to `stages`
(which train) or `evaluation` (which asks). Written by [`write_tree_page.py`](write_tree_page.py).
"""


def purpose(file: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0].rstrip(".")


def page() -> str:
    """The text of docs/tree.md."""
    sections = [HEAD]
    for folder in FOLDERS:
        package = ROOT / folder / "__init__.py"
        about = purpose(package) if package.is_file() else ""
        files = [file for file in sorted((ROOT / folder).glob("*.py")) if file.name != "__init__.py"]
        rows = [f"| [`{file.name}`](../{folder}/{file.name}) | {purpose(file)} |" for file in files]
        title = f"## `{folder}/`" + (f"\n\n{about}." if about else "")
        sections.append("\n".join([title, "", "| file | what it is for |", "|---|---|", *rows, ""]))
    return "\n".join(sections)


if __name__ == "__main__":
    (ROOT / "docs/tree.md").write_text(page())

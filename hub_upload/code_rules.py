"""What Python files that `trust_remote_code` runs may do, read from their syntax trees; nothing here is executed."""

import ast
from dataclasses import dataclass, field
from pathlib import Path


# Computation, types and transformers; nothing that reaches files, processes or a network by itself.
ALLOWED_IMPORTS = frozenset(
    "PIL __future__ abc collections copy dataclasses enum functools itertools math numpy os torch transformers typing".split()
)
ALLOWED_OF_OS = frozenset("PathLike path".split())
# Names and attributes that run code, read or write files, or reach out.
FORBIDDEN_NAMES = frozenset(
    "__builtins__ __import__ __loader__ breakpoint compile delattr eval exec exit globals input locals open quit vars".split()
)
FORBIDDEN_ATTRIBUTES = frozenset(
    "__builtins__ __globals__ __loader__ __subclasses__ cached_file environ fork from_file get_class_from_dynamic_module "
    "hf_hub_download hub import_module load_state_dict_from_url popen putenv read_bytes read_text remove rmtree run_path "
    "snapshot_download spawn system tofile unlink urlopen write_bytes write_text".split()
)
FILE_FUNCTIONS = frozenset(f"{module}.{name}" for module in ("torch", "np", "numpy") for name in ("load", "save"))
# Statements that only define; everything else would run when the file is imported.
HARMLESS_CALLS = frozenset("dict field frozenset get_logger list range set tuple TypeVar".split())
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


@dataclass
class Findings:
    """What a file imports, and what of it the rules do not allow, each with its line."""

    imports: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_code(path: Path, known_files: set[str]) -> Findings:
    """Reads one Python file.

    Args:
        known_files: the names of the files beside it, which its relative imports may name.
    """
    found = Findings()
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        found.problems.append(f"cannot be read as Python: {error}")
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _import(found, alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.level:
            _relative_import(found, node, known_files)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                _import(found, node.module, alias.name, node.lineno)
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.problems.append(f"line {node.lineno}: uses {node.id}")
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
            found.problems.append(f"line {node.lineno}: uses .{node.attr}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in FILE_FUNCTIONS:
            found.problems.append(f"line {node.lineno}: uses {ast.unparse(node)}, which reads or writes files")
    _runs_at_import(found, tree.body)
    found.imports = sorted(set(found.imports))
    found.problems = list(dict.fromkeys(found.problems))
    return found


def _runs_at_import(found: Findings, body: list[ast.stmt]) -> None:
    """Finds what does more than define, in a module and in its classes."""
    for node in body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not isinstance(node, (*DEFINITIONS, ast.Pass)) and not is_text:
            found.problems.append(f"line {node.lineno}: {ast.unparse(node).splitlines()[0][:60]!r} runs at import")
        elif isinstance(node, ast.ClassDef):
            _runs_at_import(found, node.body)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for call in (inner for inner in ast.walk(node.value) if isinstance(inner, ast.Call)):
                if ast.unparse(call.func).split(".")[-1] not in HARMLESS_CALLS:
                    found.problems.append(f"line {call.lineno}: {ast.unparse(call)[:60]!r} runs at import")


def _import(found: Findings, module: str, name: str | None, line: int) -> None:
    root = module.split(".")[0]
    found.imports.append(module if name is None else f"{module}.{name}")
    if root not in ALLOWED_IMPORTS:
        found.problems.append(f"line {line}: imports {module}, which is not on the list of what model code needs")
    elif reached := {*module.split("."), name} & FORBIDDEN_ATTRIBUTES:
        found.problems.append(f"line {line}: imports {', '.join(sorted(reached))}")
    elif root == "os" and name is not None and name not in ALLOWED_OF_OS:
        found.problems.append(f"line {line}: imports {name} from os")


def _relative_import(found: Findings, node: ast.ImportFrom, known_files: set[str]) -> None:
    """The loader of remote code finds `from .name import x` by a regular expression, and nothing else."""
    target = node.module or ""
    found.imports.append("." * node.level + target)
    if node.level > 1 or not target or "." in target:
        found.problems.append(f"line {node.lineno}: transformers cannot follow this relative import")
    elif f"{target}.py" not in known_files:
        found.problems.append(f"line {node.lineno}: .{target} is not in the folder")

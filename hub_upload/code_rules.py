"""Rules for Python files that `trust_remote_code` runs, checked on their syntax trees; nothing is executed.

They help a reader and are no sandbox: Python has more ways than there are rules.
"""

import ast
import builtins
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


# Computation, types and transformers; nothing that reaches files, processes or a network by itself.
ALLOWED_IMPORTS = frozenset(
    "PIL __future__ abc collections copy dataclasses enum functools itertools math numpy os torch transformers typing".split()
)
ALLOWED_OF_OS = frozenset("PathLike path".split())
# Names, attributes and arguments that run code, read or write files, or reach out, whatever they belong to.
FORBIDDEN_NAMES = frozenset(
    "__builtins__ __import__ __loader__ breakpoint compile delattr eval exec exit globals input locals open quit vars".split()
)
FORBIDDEN_ATTRIBUTES = frozenset(
    "__builtins__ __globals__ __loader__ __subclasses__ cached_file cpp_extension ctypeslib distributed environ from_file "
    "from_pretrained fromfile genfromtxt get_class_from_dynamic_module getenv hf_hub_download hub import_module load_file "
    "load_library load_state_dict_from_url loadtxt memmap multiprocessing package popen push_to_hub read_bytes read_text rmtree "
    "run_path save_file savetxt savez snapshot_download system tofile trust_remote_code unlink urlopen write_bytes write_text".split()
)
FILE_MODULES, FILE_FUNCTIONS = frozenset("torch numpy".split()), frozenset("load save".split())
# Statements that only define, and calls that only make values; everything else would run when the file is imported.
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Pass)
HARMLESS_CALLS = frozenset(
    "dict field frozenset get_logger list no_grad range set tuple lru_cache dataclass TypeVar wraps".split()
)


@dataclass
class Findings:
    """The imports of a file, and everything in it that breaks a rule, with its line."""

    imports: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_code(path: Path, known_files: set[str]) -> Findings:
    """Reads one Python file.

    Args:
        known_files: the names of the files beside it, which its relative imports may name.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        return Findings(problems=[f"cannot be read as Python: {error}"])
    reader = _Reader(known_files)
    reader.visit(tree)
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for line, text in _runs_at_import(tree.body, own, _value_classes(tree, reader.stands_for)):
        reader.problems.append(f"line {line}: {text[:60]!r} runs at import")
    return Findings(sorted(reader.imports), list(dict.fromkeys(reader.problems)))


class _Reader(ast.NodeVisitor):
    """Collects imports and forbidden uses; follows names to their imports."""

    def __init__(self, known_files: set[str]):
        self.known_files = known_files
        self.imports: set[str] = set()
        self.problems: list[str] = []
        self.stands_for: dict[str, str] = {}

    def report(self, node: ast.AST, text: str) -> None:
        self.problems.append(f"line {node.lineno}: {text}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imports.add(alias.name)
            self.stands_for[alias.asname or alias.name.split(".")[0]] = (
                alias.name if alias.asname else alias.name.split(".")[0]
            )
            self.check_import(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:  # transformers finds only `from .name import x`, by a regular expression
            self.imports.add("." * node.level + module)
            if node.level > 1 or not module or "." in module:
                self.report(node, "transformers cannot follow this relative import")
            elif f"{module}.py" not in self.known_files:
                self.report(node, f".{module} is not in the folder")
            return
        for alias in node.names:
            full = f"{module}.{alias.name}"
            self.imports.add(full)
            self.stands_for[alias.asname or alias.name] = full
            self.check_import(node, full)

    def check_import(self, node: ast.AST, full: str) -> None:
        if full.split(".")[0] not in ALLOWED_IMPORTS:
            self.report(node, f"imports {full}, which is not on the list of what model code needs")
        else:
            self.check_use(node, full, "imports")

    def check_use(self, node: ast.AST, full: str, verb: str = "uses") -> None:
        """A dotted name, written out in full."""
        parts = full.split(".")
        if reached := [part for part in parts[1:] if part in FORBIDDEN_ATTRIBUTES]:
            self.report(node, f"{verb} {full}, where .{reached[0]} is more than model code needs")
        elif parts[0] in FILE_MODULES and parts[-1] in FILE_FUNCTIONS:
            self.report(node, f"{verb} {full}, which reads or writes files")
        elif parts[0] == "os" and len(parts) > 1 and parts[1] not in ALLOWED_OF_OS:
            self.report(node, f"{verb} {full}; of os only {', '.join(sorted(ALLOWED_OF_OS))} are allowed")

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in FORBIDDEN_NAMES:
            self.report(node, f"uses {node.id}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        names, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        root = self.stands_for.get(inner.id, inner.id) if isinstance(inner, ast.Name) else "?"
        self.check_use(node, ".".join([root, *reversed(names)]))
        self.visit(inner)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg in FORBIDDEN_ATTRIBUTES:
            self.report(node.value, f"passes {node.arg}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("getattr", "setattr") and len(node.args) > 1:
            wanted = node.args[1]
            of_self = isinstance(node.args[0], ast.Name) and node.args[0].id == "self"
            if isinstance(wanted, ast.Constant):
                self.check_use(node, f"?.{wanted.value}")
            elif not of_self:
                self.report(node, f"{name} of a name that is computed")
        self.generic_visit(node)


def _outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _outside_functions(node)


def _value_classes(tree: ast.Module, stands_for: dict[str, str]) -> set[str]:
    """Dataclasses that only hold values: making one runs no code of the file, so that a table may consist of them.

    They have fields, with constants as defaults, and methods, none of which is special or shares its name with a field. A file that
    rebinds such a class, or assigns to an attribute of anything while it is imported, has none.
    """
    names: Counter[str] = Counter()
    for node in _outside_functions(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[node.name] += 1
        elif isinstance(node, ast.alias):
            names[node.asname or node.name] += 1
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names[node.id] += 1
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            return set()
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and names[node.name] == 1 and _only_holds_values(node, names, stands_for)
    }


def _only_holds_values(node: ast.ClassDef, names: Counter[str], stands_for: dict[str, str]) -> bool:
    if node.bases or node.keywords or len(node.decorator_list) != 1:
        return False
    decorator = node.decorator_list[0]
    decorator = decorator.func if isinstance(decorator, ast.Call) else decorator
    if not isinstance(decorator, ast.Name) or names[decorator.id] != 1:
        return False
    fields, methods = set(), set()
    for part in node.body:
        constant = isinstance(getattr(part, "value", None), ast.Constant)
        if isinstance(part, ast.AnnAssign) and (part.value is None or constant):
            fields.add(ast.unparse(part.target))
        elif isinstance(part, ast.FunctionDef) and not part.name.startswith("__"):
            methods.add(part.name)
        elif not (isinstance(part, ast.Expr) and constant):
            return False
    return stands_for.get(decorator.id) == "dataclasses.dataclass" and not fields & methods


def _runs_at_import(body: list[ast.stmt], own: set[str], values: set[str]) -> Iterator[tuple[int, str]]:
    """Yields line and text of everything that does more than define, in a module and its classes.

    Args:
        own: the names the file defines.
        values: its classes that only hold values.
    """
    for node in body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not isinstance(node, DEFINITIONS) and not is_text:
            yield node.lineno, ast.unparse(node).splitlines()[0]
            continue
        evaluated: list[ast.AST | None] = []
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            evaluated = [node.value]
        elif isinstance(node, ast.FunctionDef):
            evaluated = [*node.decorator_list, *node.args.defaults, *node.args.kw_defaults]
        elif isinstance(node, ast.ClassDef):
            evaluated = [*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)]
            yield from _runs_at_import(node.body, own, values)
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Name) and (decorator.id in own or _runs(decorator.id)):
                yield decorator.lineno, f"@{ast.unparse(decorator)}"
        for call in (inner for value in evaluated if value is not None for inner in ast.walk(value)):
            if not isinstance(call, ast.Call) or (isinstance(call.func, ast.Name) and call.func.id in values):
                continue
            if ast.unparse(call.func).split(".")[-1] not in HARMLESS_CALLS:
                yield call.lineno, ast.unparse(call)


def _runs(name: str) -> bool:
    """Whether a name is a builtin other than those that make methods."""
    return hasattr(builtins, name) and name not in ("classmethod", "property", "staticmethod")

"""The house: imports point downwards, files and functions fit a reader, one name for one thing."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up; README's "Where things are" draws the same tower.
FLOORS = (
    (
        "command_line",
    ),  # the command `muse` starts scripts by name and imports nothing of the package
    ("errors", "stages", "config", "config_checks", "config_fields")
    + ("config_model", "config_run", "config_schema"),
    ("utils",),
    ("data",),
    ("models",),
    ("cli", "inference"),
    ("teachers",),
    ("losses",),
    ("analysis",),
    ("evaluation",),
    ("training",),
    ("generation", "multimodal"),
    ("experiments", "commands"),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((ROOT / "muse").rglob("*.py"))
}
SHARED_NAMES = {"__init__", "base", "build"}
MAX_LINES, MAX_FUNCTION_LINES, MAX_LATE_IMPORTS = 300, 60, 45


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "muse"


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports anywhere in its text."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, file in MODULES.items():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "muse":
                for alias in node.names:
                    target = f"{node.module}.{alias.name}"
                    found[module].add(target if target in MODULES else node.module)
            elif isinstance(node, ast.Import):
                found[module] |= {a.name for a in node.names if a.name.split(".")[0] == "muse"}
        found[module].discard(module)
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in arrows.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            part = []
            while True:
                part.append(stack.pop())
                if part[-1] == node:
                    break
            if len(part) > 1:
                found.append(sorted(part))

    for node in list(arrows):
        if node not in index:
            visit(node)
    return found


def test_no_circle_of_files():
    assert circles(imports()) == []


def test_no_circle_of_rooms():
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, targets in imports().items():
        arrows[room(module)] |= {room(target) for target in targets} - {room(module)}
    arrows.pop("muse", None)  # `import muse` is the version, and names loaded when asked for
    assert circles(arrows) == []


def test_every_import_points_downwards():
    upward = [
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in sorted(targets)
        if module != "muse" and target != "muse" and LEVEL[room(module)] < LEVEL[room(target)]
    ]
    assert upward == []


def test_files_and_functions_fit_a_reader():
    long = []
    for file in [*MODULES.values(), *sorted((ROOT / "scripts").glob("*.py"))]:
        lines = file.read_text(encoding="utf-8").count("\n")
        if lines > MAX_LINES:
            long.append(f"{file.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef):
                size = node.end_lineno - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    long.append(f"{file.relative_to(ROOT)}: {node.name} has {size} lines")
    assert long == []


def test_imports_stand_at_the_top():
    """Inside a function only for a heavy package that a quick start must not load."""
    late = [
        f"{module}: {ast.unparse(inner)}"
        for module, file in MODULES.items()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert len(late) <= MAX_LATE_IMPORTS, late


def test_no_two_modules_of_one_name():
    files = defaultdict(list)
    for file in MODULES.values():
        files[file.stem].append(str(file.relative_to(ROOT)))
    twice = {name: where for name, where in files.items() if len(where) > 1}
    assert {name: where for name, where in twice.items() if name not in SHARED_NAMES} == {}


def test_no_two_public_classes_or_functions_of_one_name():
    where = defaultdict(list)
    for module, file in MODULES.items():
        for node in tree(file).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(module)
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("name", ["print"])
def test_the_package_logs_and_does_not_print(name):
    calls = [
        f"{module}:{node.lineno}"
        for module, file in MODULES.items()
        if module not in ("muse.cli", "muse.command_line")
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name
    ]
    assert calls == []

"""The house stands as drawn: a room imports only from rooms below it, files form no cycles, each is short enough to read.

Two exceptions, each named here: the lazy table of public names in `deltaw/__init__.py`, and `core/plugins.py`, which
loads the rooms of methods and hosts by name so that they register themselves.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "deltaw"
ROWS = [  # top to bottom; rooms in a row do not know each other
    {"__main__"},
    {"cli", "studio"},
    {"lab"},
    {"training", "serve"},
    {"infer", "ship"},
    {"data", "models", "library"},
    {"formats", "mixing", "analysis", "planner", "config", "runs"},
    {"methods", "hosts", "fusion", "nn"},
    {"core", "kernels"},
]
LEVEL = {room: len(ROWS) - number for number, row in enumerate(ROWS) for room in row}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
ABSENT = {"studio", "serve"}
"""Rooms of the design that are not built yet: a new one must leave this list."""


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in [*FILES, PACKAGE / "__init__.py"]}


def room(module: str) -> str:
    return module.split(".")[1]


def own_imports(path: Path, lazy: bool) -> Iterator[tuple[str, int]]:
    """Modules of ours that a file imports, with the line: at its top level, or (`lazy`) only inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or (id(node) in inside) != lazy:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in full]
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "deltaw")


def test_every_room_has_its_place() -> None:
    rooms = {room(dotted(path)) for path in FILES}
    assert rooms <= set(LEVEL) and set(LEVEL) - rooms == ABSENT


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_below(path: Path) -> None:
    here = dotted(path)
    wrong = []
    for lazy in (False, True):
        for name, line in own_imports(path, lazy):
            if name == "deltaw":
                continue  # the version, and in cli the public names
            if room(name) != room(here) and LEVEL[room(name)] >= LEVEL[room(here)]:
                wrong.append(f"{path.name}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stand_at_the_top(path: Path) -> None:
    """Only the command line imports our own modules late: for a quick --help."""
    late = [f"{path.name}:{line} imports {name}" for name, line in own_imports(path, lazy=True)]
    assert not late or room(dotted(path)) == "cli"


def test_reaching_up_is_confined_to_two_places() -> None:
    """Loading our own modules by name would go round the walls: the table and the plug-in loader alone may."""
    found = {
        dotted(path)
        for path in [*FILES, PACKAGE / "__init__.py"]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "import_module"
    }
    assert found == {"deltaw", "deltaw.core.plugins"}


def test_no_file_imports_itself_round_a_corner() -> None:
    graph = {dotted(path): {name for name, _ in own_imports(path, lazy=False) if name in MODULES} for path in FILES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
    if lines and room(dotted(path)) != "__main__":
        assert lines[0].startswith('"""'), "a file opens with its idea"

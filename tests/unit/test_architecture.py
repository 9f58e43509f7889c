"""What may import what, from the import statements themselves."""

import ast
from pathlib import Path

import fuseline
import pytest

ROOT = Path(fuseline.__file__).parent
# Each imports from itself and from what stands after it; stages do not import each other.
ROOMS = ["cli", "commands", "pipeline", ("train", "eval", "align", "ingest"), "store"]
ROOT_FILES = {"__init__.py", "__main__.py", "cli.py"}


def modules() -> dict[str, Path]:
    """Path of each module of the package, by its name without the package's."""
    rooms = [room for each in ROOMS for room in ((each,) if isinstance(each, str) else each)]
    paths = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, wherever in it the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        package = name.split(".")[: -node.level]
        module = ".".join([*package, *([node.module] if node.module else [])])
        for alias in node.names:
            whole = f"{module}.{alias.name}".lstrip(".")
            candidates = (whole, f"{whole}.__init__", module, f"{module}.__init__".lstrip("."))
            found.add(next(candidate for candidate in candidates if candidate in known))
    return found - {name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def level(name: str) -> int:
    room = name.split(".")[0]
    return next(index for index, each in enumerate(ROOMS) if room == each or room in each)


def test_nothing_lies_at_the_root_but_the_command_line():
    assert {path.name for path in ROOT.glob("*.py")} == ROOT_FILES


def test_nothing_imports_upward_or_another_stage(graph):
    wrong = []
    for name, imported in graph.items():
        for other in imported - {"__init__"}:  # which holds the version
            if name in ("__init__", "__main__") or name.split(".")[0] == other.split(".")[0]:
                continue
            if level(other) <= level(name):
                wrong.append((name, other))
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle(graph):
    left = {name: set(imported) for name, imported in graph.items()}
    while free := [name for name, imported in left.items() if not imported]:
        for name in free:
            del left[name]
        for imported in left.values():
            imported.difference_update(free)
    assert left == {}

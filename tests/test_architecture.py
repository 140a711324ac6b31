"""The arrows between rooms go one way: schemas <- core <- passes, backends; checked by reading every import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import graphopt

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("passes", "backends", "schemas")
#: What may import what; ``core`` is everything in graphopt/ outside the rooms.
ALLOWED = {
    "schemas": {"schemas"},
    "core": {"core", "schemas"},
    "passes": {"passes", "core", "schemas"},
    "backends": {"backends", "core", "schemas"},
}


def modules() -> dict[str, Path]:
    """Every module of ours by its import name, with its file."""
    found = {}
    for folder, package in (("graphopt", "graphopt"), *((room, f"graphopt.{room}") for room in ROOMS)):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "graphopt" and parts[0] in ROOMS:
                continue  # a symlink to a room
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def room_of(module: str) -> str | None:
    """Which room an imported module is of; None if it is not ours."""
    first, *rest = module.split(".")
    if first in ROOMS:
        return first
    if first != "graphopt":
        return None
    return rest[0] if rest and rest[0] in ROOMS else "core"


def imports(path: Path, *, lazy: bool = True) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, and the line; without ``lazy`` only those at the time it is imported."""
    for node in walk(ast.parse(path.read_text()), lazy):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            module = str(node.module)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield (inner if inner in MODULES or room_of(inner) != room_of(module) else module), node.lineno


def walk(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not lazy and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if not lazy and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from walk(node, lazy)


def test_all_rooms_are_found() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert rooms == set(ALLOWED)
    assert {"graphopt.ir", "graphopt.passes.fuse_attention", "graphopt.backends.onnx.emitter"} <= MODULES.keys()


def test_the_rooms_are_seen_as_one_tree() -> None:
    for room in ROOMS:
        assert (ROOT / "graphopt" / room).resolve() == ROOT / room
    assert Path(graphopt.__file__).resolve().parent == ROOT / "graphopt"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    room = str(room_of(module))
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {target}"
        for target, line in imports(MODULES[module])
        if (found := room_of(target)) is not None and found not in ALLOWED[room]
    ]
    assert wrong == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_rooms_are_imported_through_the_package(module: str) -> None:
    """``graphopt.passes``, never ``passes``: else a module would be loaded twice."""
    assert [(target, line) for target, line in imports(MODULES[module]) if target.split(".")[0] in ROOMS] == []


def test_modules_do_not_import_in_circles() -> None:
    """At import time; functions may import later what would be a circle at first."""
    edges = [(module, target) for module, path in MODULES.items() for target, _ in imports(path, lazy=False)]
    ours: nx.DiGraph[str] = nx.DiGraph((a, b) for a, b in edges if b in MODULES and a != b)
    ours.remove_node("graphopt")  # the front door imports all
    assert list(nx.simple_cycles(ours)) == []


def test_schemas_stand_on_pydantic_alone() -> None:
    targets = {target.split(".")[0] for path in (ROOT / "schemas").rglob("*.py") for target, _ in imports(path)}
    assert targets <= {"__future__", "typing", "pydantic", "graphopt", "datetime", "pathlib", "collections"}


@pytest.mark.parametrize(
    ("module", "room"),
    [
        ("graphopt.ir", "core"),
        ("graphopt", "core"),
        ("graphopt.passes", "passes"),
        ("graphopt.backends.onnx.emitter", "backends"),
        ("schemas.report", "schemas"),
        ("torch.nn", None),
    ],
)
def test_room_of(module: str, room: str | None) -> None:
    assert room_of(module) == room

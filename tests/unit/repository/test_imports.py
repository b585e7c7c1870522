"""What the rooms of the house import of each other, read off the source, types included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

from kara_sglang import hooks

PACKAGE = ROOT / "kara_sglang"
OURS = "kara_sglang"
FLOORS = (
    ("plan", "doctor"),
    ("benchmarks",),
    ("frontend", "serve", "top"),
    ("cpu_engine", "embedded_model"),
    ("launcher", "scheduler"),
    ("handshake",),
    ("",),  # the package itself
    ("plugin", "options"),
    ("compat",),
    ("hooks",),
    ("config",),
    ("checks", "trace"),
    ("radix_integration",),
    ("kernels",),
)
"""From the top down; rooms of one floor do not import each other."""
BESIDE = {"plan": {"doctor"}, "doctor": {"plan"}}
"""But for these: each shows what the other finds."""


def module_of(path: Path) -> str:
    """Its dotted name; a package is its ``__init__``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == OURS else (OURS, *parts))
    return name.removesuffix(".__init__")


def sources() -> dict[str, Path]:
    """All modules of the package; the sibling folders once, under the names they are imported by."""
    found = {}
    for top in (PACKAGE, *(PACKAGE / link for link in PACKAGE.iterdir() if link.is_symlink())):
        for path in top.rglob("*.py"):
            inside = path.relative_to(PACKAGE).parts
            if "site" not in inside and "data" not in inside:
                found[module_of(path)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in whole]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == OURS)


KNOWN = sources()
ARROWS = {module: set(imports(path, KNOWN)) - {module} for module, path in KNOWN.items()}


def room_of(module: str) -> str:
    return "" if module == OURS else module.removeprefix(f"{OURS}.").split(".")[0]


def floor_of(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


@pytest.mark.parametrize("module", KNOWN)
def test_imports_go_down(module: str) -> None:
    """The floors of docs/architecture.md: a module imports of its own room and of rooms below only."""
    room = room_of(module)
    allowed = {room, *BESIDE.get(room, ())}.union(*FLOORS[floor_of(room) + 1 :])
    assert not {other for other in ARROWS[module] if room_of(other) not in allowed}


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in KNOWN} == {room for floor in FLOORS for room in floor}


def test_ownership_imports_kernels_at_most() -> None:
    for room, allowed in (("kernels", {"kernels"}), ("radix_integration", {"kernels"})):
        others = {
            room_of(other) for module, s in ARROWS.items() if room_of(module) == room for other in s
        }
        assert others <= {*allowed, room}


def test_there_are_no_circles() -> None:
    """Modules can be laid in an order in which each imports earlier ones only, types included."""
    left = {module: set(others) for module, others in ARROWS.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not {module: sorted(others & left.keys()) for module, others in left.items()}


def test_nobody_imports_a_main() -> None:
    assert not [
        (module, other)
        for module, others in ARROWS.items()
        for other in others
        if other.endswith(".__main__")
    ]


@pytest.mark.parametrize(
    ("table", "rooms"),
    [
        (hooks.CLI_HOOKS, {"launcher"}),
        (hooks.LAUNCHER_HOOKS, {"launcher"}),
        (hooks.SCHEDULER_HOOKS, {"scheduler", "handshake"}),
        (hooks.SHARING_HOOKS, {"radix_integration"}),
    ],
)
def test_handlers_lie_in_their_room(table: tuple[hooks.Hook, ...], rooms: set[str]) -> None:
    handlers = [one.handler for hook in table for one in (hook, *hook.otherwise)]
    assert {room_of(f"{OURS}.{handler.partition(':')[0]}") for handler in handlers} == rooms

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
    ("doctor",),
    ("plan",),
    ("benchmarks",),
    ("frontend", "serve", "top"),
    ("cpu_engine", "embedded_model"),
    ("launcher", "scheduler"),
    ("handshake",),
    ("",),  # the package itself
    ("plugin", "options", "prefix_reuse"),
    ("compat",),
    ("hooks",),
    ("config",),
    ("checks", "trace"),
    ("radix_integration",),
    ("kernels",),
)
"""From the top down; rooms of one floor do not import each other."""


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
    allowed = {room}.union(*FLOORS[floor_of(room) + 1 :])
    assert not {other for other in ARROWS[module] if room_of(other) not in allowed}


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in KNOWN} == {room for floor in FLOORS for room in floor}


def test_ownership_imports_kernels_at_most() -> None:
    for room, allowed in (("kernels", {"kernels"}), ("radix_integration", {"kernels"})):
        others = {
            room_of(other) for module, s in ARROWS.items() if room_of(module) == room for other in s
        }
        assert others <= {*allowed, room}


def circles(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left when all have gone who only know those that have gone."""
    left = dict(arrows)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return {name: others & left.keys() for name, others in left.items()}


def test_there_are_no_circles() -> None:
    """Modules can be laid in an order in which each imports earlier ones only, types included."""
    assert not circles(ARROWS)


def test_folders_of_benchmarks_know_each_other_one_way() -> None:
    """What lies beside them is what they share."""
    prefix = f"{OURS}.benchmarks."

    def folder_of(module: str) -> str:
        return module.removeprefix(prefix).rpartition(".")[0].partition(".")[0]

    arrows: dict[str, set[str]] = {}
    for module, others in ARROWS.items():
        if module.startswith(prefix):
            ours = {folder_of(other) for other in others if other.startswith(prefix)}
            arrows.setdefault(folder_of(module), set()).update(ours - {folder_of(module)})
    assert len(arrows) >= 6
    assert not arrows[""], "what is shared knows none of them"
    assert not circles(arrows)


def test_no_instrument_imports_research() -> None:
    """The search that chose the defaults uses the instruments, and nobody uses the search."""
    inside = f"{OURS}.benchmarks.research."
    users = {
        module
        for module, others in ARROWS.items()
        if any(other.startswith(inside) for other in others) and not module.startswith(inside)
    }
    assert not users


def test_nobody_imports_a_main() -> None:
    """Neither the package nor its tests: a command's ``main`` stands beside its ``__main__``."""
    tests = {str(path): path for folder in ("tests", "docs") for path in (ROOT / folder).rglob("*.py")}
    assert len(tests) > 100
    assert not [
        (name, other)
        for name, path in (KNOWN | tests).items()
        for other in imports(path, KNOWN)
        if other.endswith(".__main__")
    ]


@pytest.mark.parametrize(
    ("table", "rooms"),
    [
        (hooks.CLI_HOOKS, {"launcher"}),
        (hooks.LAUNCHER_HOOKS, {"launcher"}),
        (hooks.SCHEDULER_HOOKS, {"scheduler", "handshake"}),
        (hooks.PREFILL_HOOKS, {"radix_integration"}),
    ],
)
def test_handlers_lie_in_their_room(table: tuple[hooks.Hook, ...], rooms: set[str]) -> None:
    handlers = [one.handler for hook in table for one in (hook, *hook.otherwise)]
    assert {room_of(f"{OURS}.{handler.partition(':')[0]}") for handler in handlers} == rooms

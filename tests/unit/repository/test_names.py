"""Tests are found by name: those of a module stand in a file of its name, in the room of its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

TESTS = ROOT / "tests"
ROOMS = ("kara_sglang", "kernels", "radix_integration", "frontend")

SELECTORS = ("base", "causal", "identity", "kara", "keys", "random", "recent", "settings", "snapkv")
"""One matrix holds all of them."""

ELSEWHERE = {
    "cpu_engine/install": ("unit/test_cpu_engine.py", "install.main("),
    "scheduler/scales": ("unit/scheduler/test_fp8_kv.py", "softmax_scales("),
    "frontend/backend": ("engine/test_frontend.py", "KaraEndpoint("),
    "frontend/programs": ("engine/test_frontend.py", '"kara_sglang.frontend", "solve"'),
    "kernels/backend": ("kernels/test_pass.py", "TorchKernels("),
    "kernels/triton/backend": ("kernels/test_pass.py", "TritonKernels("),
    "kernels/triton/numbers": ("kernels/test_record.py", "numbers.to_e4m3("),
    "kernels/triton/pool": ("kernels/test_pass.py", "PoolTables.of("),
    "kernels/triton/prepare": ("kernels/test_weights.py", "triton.prepare import weight_scores"),
    **dict.fromkeys(
        (f"kernels/selectors/{name}" for name in SELECTORS),
        ("unit/kernels/test_selectors.py", 'parametrize("name", REGISTRY)'),
    ),
}
"""Modules whose tests stand under another name: the file, and the words in it that use the module."""


def modules() -> Iterator[str]:
    """Paths of all that is imported and does something, below the package."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            inside = path.relative_to(ROOT / room).parts
            linked = any((ROOT / room / part).is_symlink() for part in inside[:1])
            if linked or path.stem in ("__init__", "__main__") or {"site", "examples"} & {*inside}:
                continue
            module = path.relative_to(ROOT).with_suffix("").as_posix()
            yield module.removeprefix("kara_sglang/")


def files_of(module: str) -> list[Path]:
    """Test files of the module's name; ``tests/kernels`` is the room of the Triton kernels, and a large
    module may have several files that begin with its name."""
    room, _, name = module.rpartition("/")
    rooms = [TESTS / "unit" / room, TESTS / room.removesuffix("/triton")]
    return [
        path
        for folder in rooms
        for path in (*folder.glob(f"test_{name}.py"), *folder.glob(f"test_{name}_*.py"))
    ]


@pytest.mark.parametrize("module", modules())
def test_a_modules_tests_are_found_by_its_name(module: str) -> None:
    named = files_of(module)
    assert bool(named) != (module in ELSEWHERE), f"{module}: {named or 'no test file of its name'}"


@pytest.mark.parametrize("module", ELSEWHERE)
def test_what_stands_elsewhere_stands_there(module: str) -> None:
    file, words = ELSEWHERE[module]
    assert module in modules(), "the module is gone"
    assert words in (TESTS / file).read_text()

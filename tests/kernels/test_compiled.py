"""The kernels as the compiler makes them for sm_80, sm_90 and sm_100; no GPU is needed.

What the interpreter cannot show: that they compile, that nothing is spilled, that memory is accessed
16 bytes at a time, that copies run ahead of what they are for, and that the in-place move keeps its
order of loads, barrier and stores.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
import triton
from places import ROOT
from triton import knobs

from kara_sglang.benchmarks.gpu import compiled as compiled_module
from kara_sglang.benchmarks.gpu.compiled import (
    ARCHITECTURES,
    KERNELS,
    LOGITS,
    OTHER_SHAPES,
    SCORE,
    SELECT,
    WEIGHTS,
    Compiled,
    Launch,
    cases,
    issued,
    launches,
    of,
    report,
)
from kara_sglang.benchmarks.models import MODELS
from kara_sglang.kernels.record import FP4, FP8

pytestmark = pytest.mark.skipif(
    knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)

SHAPES = {model.name: model for model in (*MODELS, *OTHER_SHAPES)}
MOST_SHARED = {80: 99, 90: 227, 100: 227}
"""KiB that a program may have (CUDA C++ Programming Guide, technical specifications). sm_80 has 163,
but what is compiled for it must fit sm_86 and sm_89, too."""


def check(result: Compiled) -> None:
    # Far from 255 registers ptxas now and then saves two of them, to fit one more program to an SM.
    allowed = 8 if result.registers <= 80 else 0
    assert result.spilled <= allowed, f"{result.kernel} spills {result.spilled} bytes a thread"
    assert result.registers <= 255
    assert result.shared <= MOST_SHARED[result.architecture] * 1024


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_of_qwen3_8b(architecture):
    results = [launch.compile(architecture) for launch in launches(SHAPES["Qwen3-8B"], architecture)]
    assert [result.kernel for result in results] == list(KERNELS)
    for result in results:
        check(result)
        assert_wide(result)


def scalars(launch: Launch) -> dict[str, int]:
    """Numbers that the kernel is given when it runs, not when it is compiled."""
    names = [param.name for param in launch.kernel.params if not param.is_constexpr]
    found = {name: launch.arguments[name] for name in names}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def read(result: Compiled) -> set[int]:
    """Which of its parameters the code reads at all."""
    return set(map(int, re.findall(r"ld\.param\.\w+\s[^;]*_param_(\d+)\]", result.ptx)))


@pytest.mark.parametrize("experiment", [{"causal": True}, {"ahead": False}, {"chunks": True}], ids=str)
def test_experiments_cost_the_default_pass_no_branch(experiment):
    """Settings that exist for experiments are constants of the compiler: what a kernel is told when it
    runs is the same with and without them, but for three numbers of Token2Chunk, which the default's
    code does not read."""
    chunks = {"extra", "best", "chunk_width"}
    usual, other = (
        launches(SHAPES["Qwen3-8B"], 90, **{"chunks": False} | more) for more in ({}, experiment)
    )
    assert [one.kernel for one in usual] == [two.kernel for two in other]
    for one, two in zip(map(scalars, usual), map(scalars, other), strict=True):
        assert {name for name in one if one[name] != two[name]} <= chunks
    (select,) = of(SELECT, usual)
    names = [param.name for param in select.kernel.params if not param.is_constexpr]
    unread = {name for place, name in enumerate(names) if place not in read(select.compile(90))}
    assert unread == chunks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_without_queries(architecture):
    made = launches(SHAPES["Qwen3-8B"], architecture, votes=False)
    results = [launch.compile(architecture) for launch in made]
    kernels = ["record_kernel", "prepare_kernel", "select_kernel", "compact_kernel"]
    assert [result.kernel for result in results] == kernels
    for result in results:
        check(result)
        assert_wide(result)


@pytest.mark.parametrize("key_dtype", [torch.float32, torch.float16, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", ["head_dim 80", "head_dim 256"])
def test_weights_of_other_types(shape, key_dtype):
    for architecture in ARCHITECTURES:
        made = launches(SHAPES[shape], architecture, votes=False, key_dtype=key_dtype)
        (launch,) = of(WEIGHTS, made)
        check(launch.compile(architecture))


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ("R1-Distill-Qwen-7B", {}),
        ("Qwen3-32B", {}),
        ("head_dim 80", {}),
        ("head_dim 256", {}),
        ("head_dim 64", {"causal": True, "key_dtype": torch.float16}),
        ("Qwen3-8B", {"key_dtype": FP8, "mean": True}),
        ("Qwen3-8B", {"key_dtype": FP8}),
        ("Qwen3-8B", {"key_dtype": torch.float8_e5m2}),
        ("head_dim 80", {"key_dtype": FP8}),
        ("Qwen3-8B", {"causal": True, "chunks": False}),
        ("head_dim 96", {"causal": True, "window": 1024}),
        ("head_dim 128", {"ahead": False}),
        ("head_dim 256", {"ahead": False, "causal": True}),
        ("head_dim 128", {"halves": False}),
        ("head_dim 256", {"halves": False}),
        ("head_dim 192", {"ring_dtype": torch.bfloat16, "window": 2048}),
        ("Qwen3-8B", {"ring_dtype": torch.bfloat16, "window": 4096}),
        ("Qwen3-8B", {"ring_dtype": FP4}),
        ("R1-Distill-Qwen-7B", {"ring_dtype": FP4, "causal": True}),
        ("head_dim 64", {"ring_dtype": FP4, "key_dtype": torch.float16}),
        ("head_dim 80", {"ring_dtype": FP4}),
        ("head_dim 192", {"ring_dtype": FP4}),
        ("head_dim 256", {"ring_dtype": FP4, "key_dtype": FP8}),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_shapes(architecture, shape, settings):
    for launch in launches(SHAPES[shape], architecture, **settings):
        check(launch.compile(architecture))


@pytest.mark.parametrize(
    ("key_dtype", "ring_dtype"),
    [
        (torch.float32, torch.float8_e4m3fn),
        (torch.float32, FP4),
        (torch.float32, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", ["head_dim 128", "head_dim 256"])
def test_pairs_of_types(shape, key_dtype, ring_dtype):
    """Only the score's kernels look at both types."""
    types = {"key_dtype": key_dtype, "ring_dtype": ring_dtype}
    for architecture in ARCHITECTURES if shape == "head_dim 256" else (90,):
        for launch in of(SCORE, launches(SHAPES[shape], architecture, **types)):
            check(launch.compile(architecture))


@pytest.mark.parametrize("chunks", [True, False], ids=["chunks", "no chunks"])
@pytest.mark.parametrize("window", [256, 1024, 2048, 4096])
def test_select_for_all_widths(window, chunks):
    for architecture in ARCHITECTURES:
        made = launches(SHAPES["head_dim 64"], architecture, window=window, chunks=chunks)
        (launch,) = of(SELECT, made)
        check(launch.compile(architecture))


COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "gpu" / "compiled.json").read_text())
"""What benchmarks/results/gpu/README.md shows, see test_gpu_benchmark.py."""
needs_its_triton = pytest.mark.skipif(
    COMMITTED["versions"]["triton"] != triton.__version__,
    reason=f"the table is of triton {COMMITTED['versions']['triton']}, this is {triton.__version__}",
)


@needs_its_triton
@pytest.mark.parametrize("case", ["Qwen3-8B", "Qwen3-8B, fp4 ring", "head_dim 64, keys"])
def test_rows_of_the_table_are_what_the_compiler_makes(case):
    """Each kernel in one shape, and what fp4 and no votes change; the whole table is slow."""
    compiled = {}
    for launch in dict(cases(90))[case]:
        result = launch.compile(90)
        compiled[result.kernel] = result.registers, result.spilled, result.shared
    documented = {
        row["kernel"]: tuple(row["sm_90"].values())
        for row in COMMITTED["rows"]
        if case in row["shapes"]
    }
    assert compiled == documented


@needs_its_triton
@pytest.mark.slow
def test_the_whole_table_is_what_the_compiler_makes():
    """Some minutes."""
    found = report(ARCHITECTURES)
    assert found["rows"] == COMMITTED["rows"] and found["issued"] == COMMITTED["issued"]


@needs_its_triton
def test_what_the_score_issues_is_what_the_compiler_makes():
    found = [issued(launch) for launch in of(SCORE, launches(SHAPES["Qwen3-8B"], 90))]
    assert found == COMMITTED["issued"]


def test_instructions_of_a_warp_are_counted_from_start_to_end(monkeypatch):
    """Two loops of 2 and 3 instructions around which there are 4; behind the exit stands padding."""
    code = ["MOV", "ADD", "@P0 BRA 0x10", "MOV", "MUL", "ADD", "@P1 BRA 0x40", "ST", "EXIT"]
    lines = [*code, "BRA 0x90", "NOP"]
    text = "".join(f"        /*{16 * i:04x}*/   {each} ;\n" for i, each in enumerate(lines))
    monkeypatch.setattr(compiled_module, "cuobjdump", lambda cubin, option: text)
    found = Compiled("k", 90, 1, 0, 0, "", b"")
    assert [len(loop) for loop in found.loops()] == [2, 3]
    assert found.issues([10, 100]) == 4 + 10 * 2 + 100 * 3
    with pytest.raises(ValueError, match="k has 2 loops, 2 branches, not 1 of each"):
        found.issues([10])


def assert_wide(result: Compiled) -> None:
    """Rows of K, V and queries move 16 bytes per access, partners of numbers included. Only the ring's
    exponents, one per row, are accessed byte by byte: a few times by a thread, where the numbers of a
    tile would be dozens. What is one number per token (slots, scores, weights) takes 4 bytes."""
    accesses = re.findall(r"(?:ld|st)\.global\.[\w.]+", result.ptx)
    copies = re.findall(r"cp\.async\.\w+\.shared\.global[^;]*", result.ptx)
    narrow = [access for access in accesses if re.search(r"\.(b8|b16)$", access)]
    exponents = {"record_kernel": {"st.global.b8"}, "log_sum_exp_kernel": {"ld.global.b8"}}
    allowed = set(narrow) <= exponents.get(result.kernel, set()) and len(narrow) <= 20
    assert allowed, f"{result.kernel} accesses memory by {narrow}"
    wide = {
        "record_kernel": r"ld\.global\.v4\.b32",
        "prepare_kernel": r"ld\.global\.v4\.b32",
        "log_sum_exp_kernel": r"cp\.async\.cg\.shared\.global .* 0x10,",
        "column_sum_kernel": r"cp\.async\.cg\.shared\.global .* 0x10,",
        "compact_kernel": r"st\.global\.v2\.b64",
    }.get(result.kernel)
    if wide:
        assert any(re.search(wide, access) for access in accesses + copies), accesses + copies


def steps(loop: list[str]) -> str:
    """What a loop does in order, from its wait on: W that it waits for all copies, A for all but those
    of a later turn, C a copy into shared memory, M a matrix product, E an exponential."""
    kinds = (("LDGSTS", "C"), ("MMA", "M"), ("MUFU.EX2", "E"))
    found = []
    for instruction in loop:
        wait = re.search(r"\bDEPBAR\S* SB0, 0x(\d)", instruction)
        if wait:
            found.append("W" if wait[1] == "0" else "A")
        found += [letter for name, letter in kinds if name in instruction]
    order = "".join(found)
    start = re.search("[AW]", order).start()
    return order[start:] + order[:start]


@pytest.mark.parametrize("mean", [False, True], ids=["all heads", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_how_far_the_loops_of_the_score_copy_ahead(architecture, mean):
    """The column sums wait for a turn's queries while those of the next turn are on their way. The
    log-sum-exps hold one block of keys at a time (with two, half as many programs fit a
    multiprocessor): on sm_90 and sm_100 the next block is copied while the
    exponentials of this one are computed, on sm_80 behind them."""
    rows, columns = (
        steps(launch.compile(architecture).logits_loop)
        for launch in of(LOGITS, launches(SHAPES["Qwen3-8B"], architecture, mean=mean))
    )
    assert columns.count("A") == 1 and "W" not in columns
    assert columns.index("A") < columns.index("M") < columns.index("C")
    assert rows.count("W") == 1 and "A" not in rows
    behind_copies = rows[rows.rindex("C") :].count("E") / rows.count("E")
    assert behind_copies < 0.1 if architecture == 80 else behind_copies > 0.5


def test_instructions_of_the_score():
    """What bounds it on sm_90, where a warp issues one instruction at a time; two programs share a
    multiprocessor, so that one computes where the other waits."""
    for launch in of(LOGITS, launches(SHAPES["Qwen3-8B"], 90)):
        found = issued(launch)
        assert found["in_loops"] < 6.5 and found["whole"] < 7.5
        result = launch.compile(90)
        assert 2 * result.registers * 32 * launch.arguments["num_warps"] <= 65536
        assert 2 * (result.shared + 1024) <= 228 * 1024


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", ["Qwen3-8B", "head_dim 64", "head_dim 80"])
def test_compact_loads_a_block_before_it_stores_one(architecture, shape):
    """In each turn of the loop: all loads, a barrier, all stores; and no cached read-only path."""
    result = launches(SHAPES[shape], architecture)[-1].compile(architecture)
    assert result.kernel == "compact_kernel"
    (loop,) = re.findall(r"(?ms)^\$L\w+:[^\n]*Loop Header.*?\bbra\b", result.ptx)
    order = re.findall(r"ld\.global|st\.global|bar\.sync", loop)
    first_store = order.index("st.global")
    before, after = order[:first_store], order[first_store:]
    assert before[-1] == "bar.sync", "a store may overtake the block's loads"
    assert before.count("ld.global") >= 3
    assert set(after) == {"st.global"}, "something is read after the block's first store"
    assert ".nc." not in result.ptx

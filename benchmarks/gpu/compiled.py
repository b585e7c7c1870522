"""Compiles the kernels for GPUs that are not here, and reports what the compiler made of them.

Triton's wheel brings ptxas and cuobjdump, so neither a GPU nor CUDA is needed::

    python -m kara_sglang.benchmarks.gpu.compiled

prints two tables of benchmarks/results/gpu/README.md: registers per thread, spilled bytes per thread,
and shared memory per program; and the instructions that the score issues. Another release of Triton is
tried without touching the environment::

    pip install --target DIR --no-deps triton==3.8.0
    PYTHONPATH=DIR python -m kara_sglang.benchmarks.gpu.compiled

What is compiled is what the server would launch: a whole pass and a recording step run
on tensors of the model's shapes, and the launches are caught on their way.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import platform
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.arithmetic import DATASHEET
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.models import MODELS, Model
from kara_sglang.benchmarks.output import write_json
from kara_sglang.config import KaraConfig
from kara_sglang.kernels.backend import LayerPool, WindowJob, WindowShape
from kara_sglang.kernels.record import FP4, FP8, PAGE, Ring, Step, any_pages, most_blocks
from kara_sglang.kernels.rope_shift import RopeShift
from kara_sglang.kernels.select import ChunkRule
from kara_sglang.kernels.selectors.kara import KaraSelector
from kara_sglang.kernels.selectors.keys import KeysSelector
from kara_sglang.kernels.triton import TritonKernels, prepare, record
from kara_sglang.kernels.triton import launch as launch_module
from kara_sglang.kernels.triton import pool as pool_module

ARCHITECTURES = (80, 90, 100)
OTHER_SHAPES = (
    Model("head_dim 64", 1, 32, 8, 64, 0),
    Model("head_dim 80", 1, 32, 32, 80, 0),
    Model("head_dim 96", 1, 32, 32, 96, 0),
    Model("head_dim 128", 1, 32, 8, 128, 0),
    Model("head_dim 192", 1, 32, 8, 192, 0),
    Model("head_dim 256", 1, 16, 8, 256, 0),
)
KERNELS = (
    "record_kernel",
    "prepare_kernel",
    "log_sum_exp_kernel",
    "column_sum_kernel",
    "select_kernel",
    "compact_kernel",
)


OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
LOGITS = ("log_sum_exp_kernel", "column_sum_kernel")
SCORE = ("prepare_kernel", *LOGITS)
RECORDED = ("record_kernel", *SCORE)  # those that a ring's dtype changes
WEIGHTS, SELECT = ("prepare_kernel",), ("select_kernel",)
ISSUE_RATE = DATASHEET[0].exp_rate / 4
"""Instructions of warps per second on an H100: four per multiprocessor and clock, beside sixteen
exponentials."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with the arguments that it would have been launched with."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]

    def compile(self, architecture: int) -> Compiled:
        """Compile for ``sm_<architecture>``, specialised as a launch would be."""
        signature, constants, attributes, options = self._specialised()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a default of Triton's that changes with its next release
            built = triton.compile(
                ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes),
                target=GPUTarget("cuda", architecture, 32),
                options=options,
            )
        return Compiled.of(self.kernel.__name__, architecture, built)

    @property
    def key(self) -> str:
        """Equal for launches that share one compilation."""
        return f"{self.kernel.__name__} {self._specialised()}"

    def _specialised(self) -> tuple[dict[str, Any], dict[str, Any], dict[Any, Any], dict[str, int]]:
        """Types, constants, divisibility and options of the arguments, as a launch would see them."""
        signature: dict[str, Any] = {}
        constants: dict[str, Any] = {}
        attributes: dict[Any, Any] = {}
        parts: dict[tuple[int, ...], Any]
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            if isinstance(value, tuple):
                signature[parameter.name] = tuple(mangle_type(each) for each in value)
                parts = {(index, place): each for place, each in enumerate(value)}
            else:
                signature[parameter.name] = mangle_type(value)
                parts = {(index,): value}
            for path, each in parts.items():
                number = each.data_ptr() if isinstance(each, torch.Tensor) else each
                if number % 16 == 0 and not parameter.do_not_specialize:
                    attributes[path] = [["tt.divisibility", 16]]
        options = {name: self.arguments[name] for name in OPTIONS if name in self.arguments}
        return signature, constants, attributes, options


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of one launch.

    Attributes
    ----------
    kernel, architecture
        Name, and 90 for sm_90.
    registers, spilled
        Per thread; spilled bytes are those of the stack frame and of local memory.
    shared
        Bytes of shared memory per program.
    ptx, cubin
        The code before ptxas, and what it made of it.
    """

    kernel: str
    architecture: int
    registers: int
    spilled: int
    shared: int
    ptx: str
    cubin: bytes

    @property
    def cell(self) -> str:
        """As in the table of benchmarks/results/gpu/README.md."""
        return cell(self.registers, self.spilled, self.shared)

    def code(self) -> list[tuple[int, str]]:
        """Addresses and instructions of the machine."""
        found = re.findall(
            r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", cuobjdump(self.cubin, "-sass"), re.MULTILINE
        )
        return [(int(address, 16), instruction) for address, instruction in found]

    def loops(self) -> list[list[str]]:
        """Instructions of the machine from the head of each loop to its branch back, outer loops with
        their inner ones."""
        code = self.code()
        found = []
        for address, instruction in code:
            branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
            if branch and int(branch[1], 16) < address:
                head = int(branch[1], 16)
                found.append([each for at, each in code if head <= at <= address])
        return found

    def issues(self, turns: Sequence[int]) -> int:
        """Instructions that a warp issues until its last exit, where the loops, none of which lies in
        another, turn so often.

        Raises
        ------
        ValueError
            Where there are more or fewer loops, or a branch that leads ahead.
        """
        code = [instruction for _, instruction in self.code()]
        end = max(index for index, instruction in enumerate(code) if "EXIT" in instruction)
        loops = [len(loop) for loop in self.loops()]
        branches = sum(re.search(r"\bBRA\b", instruction) is not None for instruction in code[:end])
        if len(loops) != len(turns) or branches != len(loops):
            raise ValueError(
                f"{self.kernel} has {len(loops)} loops, {branches} branches, not {len(turns)} of each"
            )
        return end + 1 + sum((turn - 1) * size for turn, size in zip(turns, loops, strict=True))

    @property
    def logits_loop(self) -> list[str]:
        """One turn over a block of keys or queries: the shortest loop that copies into shared memory,
        multiplies matrices and takes exponentials."""
        turns = (
            loop
            for loop in self.loops()
            if all(name in str(loop) for name in ("LDGSTS", "MMA", "MUFU.EX2"))
        )
        return min(turns, key=len)

    @classmethod
    def of(cls, kernel: str, architecture: int, built: Any) -> Compiled:
        usage = cuobjdump(built.asm["cubin"], "--dump-resource-usage")
        found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        return cls(
            kernel=kernel,
            architecture=architecture,
            registers=found["REG"],
            spilled=found["STACK"] + found["LOCAL"],
            shared=built.metadata.shared,
            ptx=built.asm["ptx"],
            cubin=built.asm["cubin"],
        )


def cuobjdump(cubin: bytes, option: str) -> str:
    """What Triton's cuobjdump says of some machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def launches(
    model: Model,
    architecture: int,
    *,
    window: int = 512,
    retained: int = 256,
    delay: int = 64,
    votes: bool = True,
    mean: bool = False,
    causal: bool = False,
    chunks: bool = True,
    ahead: bool = True,
    halves: bool = True,
    key_dtype: torch.dtype = torch.bfloat16,
    ring_dtype: torch.dtype = FP8,
) -> list[Launch]:
    """The launches of one recording step and one pass over a full window, in order; without ``votes``
    the window's tokens are chosen without queries."""
    heads, dim = model.kv_heads, model.head_dim
    voices, blocks = 1 if mean else model.group, most_blocks(window + delay)
    ring = Ring.zeros((1, voices * blocks * PAGE + 1, heads, dim), ring_dtype)
    pool = LayerPool(
        keys=[torch.empty(window, heads, dim, dtype=key_dtype)],
        values=[torch.empty(window, heads, dim, dtype=key_dtype)],
        rings=[ring[0]],
        scales=[dim**-0.5],
        rope_shift=RopeShift.of_layer(torch.ones(dim // 2), torch.zeros(dim // 2), dim, halves=halves),
    )
    kara = KaraSelector(
        chunks=ChunkRule(budget=0.1 if chunks else 0.0),
        # As by default, and chunks besides.
        rule=replace(
            KaraSelector.from_config(KaraConfig()).rule,
            squared=not causal,
            ahead=ahead,
            causal=causal,
        ),
    )
    job = WindowJob(
        slots=torch.arange(window, dtype=torch.int32),
        kept=retained,
        selector=kara if votes else KeysSelector.from_config(KaraConfig()),
        seed=0,
        query_start=0,
        query_count=window + delay,
        pages=any_pages(0, window + delay, voices if votes else 0),
    )
    batch = 64
    queries = torch.empty(batch, model.query_heads * dim, dtype=torch.bfloat16)
    rows = torch.zeros(batch, dtype=torch.int64)
    step = Step(rows, rows, torch.zeros(1, blocks, model.group, dtype=torch.int32))
    capability = divmod(architecture, 10)
    with caught() as found, patch.object(pool_module, "capability_of", lambda device: capability):
        kernels = TritonKernels()
        shape = WindowShape(1, heads, dim, key_dtype, window, window, voices, window + delay)
        kernels.reserve(torch.device("cpu"), shape)
        kernels.record(ring, step, [queries])
        kernels.compress(pool, [job])
    return found


@contextlib.contextmanager
def caught() -> Iterator[list[Launch]]:
    """Collects launches in place of making them."""
    found: list[Launch] = []

    def note(launch: launch_module.Launch) -> None:
        found.append(Launch(launch.kernel, launch.arguments))

    with (
        patch.object(launch_module.Launch, "__call__", note),
        patch.object(record, "record_kernel", _Catcher(record.record_kernel, found)),
    ):
        yield found


class _Catcher:
    """Stands in for a kernel: ``catcher[grid](*args, **kwargs)`` notes the call."""

    def __init__(self, kernel: JITFunction[Any], found: list[Launch]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        positional = dict(zip(inspect.signature(self._kernel.fn).parameters, args, strict=False))
        self._found.append(Launch(self._kernel, positional | kwargs))


def cases(architecture: int) -> list[tuple[str, list[Launch]]]:
    """What the table shows: a name, and launches."""
    made = functools.partial(launches, architecture=architecture)
    first = MODELS[0]
    found = [(model.name, made(model)) for model in (*MODELS, *OTHER_SHAPES)]
    for name, settings in (
        ("bf16 ring", {"ring_dtype": torch.bfloat16}),
        ("fp4 ring", {"ring_dtype": FP4}),
        ("fp8 keys", {"key_dtype": FP8}),
        ("mean", {"mean": True}),
        ("causal", {"causal": True}),
        ("W = 1024", {"window": 1024}),
    ):
        kernels = RECORDED if "ring" in name else SCORE
        found.append((f"{first.name}, {name}", of(kernels, made(first, **settings))))
    for model in OTHER_SHAPES:
        found.append((f"head_dim {model.head_dim}, keys", of(WEIGHTS, made(model, votes=False))))
        if model.head_dim not in (128, 256):
            continue
        for name, settings in (
            ("not ahead", {"ahead": False}),
            ("pairs of neighbours", {"halves": False}),
            ("fp32 keys", {"key_dtype": torch.float32}),
            ("fp4 ring", {"ring_dtype": FP4}),
        ):
            found.append((f"head_dim {model.head_dim}, {name}", of(SCORE, made(model, **settings))))
    found.append((f"{first.name}, no chunks", of(SELECT, made(first, chunks=False))))
    for width in (1024, 2048, 4096):
        found.append((f"W = {width}", of(SELECT, made(first, window=width))))
    return found


def of(kernels: Sequence[str], found: list[Launch]) -> list[Launch]:
    """The launches of these kernels."""
    return [launch for launch in found if launch.kernel.__name__ in kernels]


def issued(launch: Launch) -> dict[str, Any]:
    """What a launch of the score issues on sm_90 for one window in all layers of Qwen3-8B.

    Returns
    -------
    dict
        ``turns`` and ``loops``: how often each loop of a program turns, and the instructions of a warp
        in one turn; ``exponentials`` among those of the loop over logits, 0 where there is none.
        ``in_loops`` and ``whole``: instructions of all warps per 32 of the window's logits, in loops
        and from start to end. ``us``: how long an H100 issues the whole, one in every clock.
    """
    arguments, name = launch.arguments, launch.kernel.__name__
    width, blocks = arguments["WIDTH"], arguments["WIDTH"] // arguments["BLOCK_K"]
    queries = MODELS[0].group * width  # the delay's do not vote
    if name == "prepare_kernel":
        programs = arguments["PARTS"]
        turns = [blocks // prepare.UNROLL.value, blocks // programs]
    else:
        steps = queries // arguments["BLOCK_Q"]
        programs, turns = (steps, [blocks]) if name == LOGITS[0] else (blocks, [steps])
    compiled = launch.compile(90)
    loops = [len(loop) for loop in compiled.loops()]
    whole = compiled.issues(turns)
    in_loops = sum(turn * size for turn, size in zip(turns, loops, strict=True))
    logits = queries * width
    per_32 = 32 * programs * arguments["num_warps"] / logits
    heads = MODELS[0].layers * MODELS[0].kv_heads
    return {
        "kernel": name,
        "turns": turns,
        "loops": loops,
        "exponentials": sum("MUFU.EX2" in each for each in compiled.logits_loop)
        if name in LOGITS
        else 0,
        "in_loops": per_32 * in_loops,
        "whole": per_32 * whole,
        "us": 1e6 * heads * logits / 32 * per_32 * whole / ISSUE_RATE,
    }


def report(architectures: Sequence[int]) -> dict[str, Any]:
    """Compile all cases, for :func:`show` and as JSON. Shapes with equal results share a row."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for alike in zip(*(cases(architecture) for architecture in architectures), strict=True):
        name = alike[0][0]
        for same in zip(*(found for _, found in alike), strict=True):
            compiled = [one.compile(number) for one, number in zip(same, architectures, strict=True)]
            used = tuple((each.registers, each.spilled, each.shared) for each in compiled)
            rows.setdefault((same[0].kernel.__name__, used), []).append(name)
    units = ("registers", "spilled_bytes", "shared_bytes")
    return {
        "versions": {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "architectures": [f"sm_{architecture}" for architecture in architectures],
        "rows": [
            {
                "kernel": kernel,
                "shapes": shapes,
                **{
                    f"sm_{architecture}": dict(zip(units, numbers, strict=True))
                    for architecture, numbers in zip(architectures, used, strict=True)
                },
            }
            for kernel in KERNELS
            for (name, used), shapes in rows.items()
            if name == kernel
        ],
        "issued": [issued(launch) for launch in of(SCORE, launches(MODELS[0], 90))],
    }


def show(found: dict[str, Any]) -> None:
    """Print the table of benchmarks/results/gpu/README.md."""
    architectures = found["architectures"]
    print(f"triton {found['versions']['triton']}; registers / spilled bytes / shared KiB\n")
    rows = []
    for row in found["rows"]:
        cells = [cell(**row[architecture]) for architecture in architectures]
        rows.append([f"`{row['kernel']}`", *cells, "; ".join(row["shapes"])])
    print(grid(["kernel", *architectures, "shapes"], rows), end="")

    print(f"\n{MODELS[0].name} on sm_90\n")
    rows = []
    for row in found["issued"]:
        loops = zip(row["turns"], row["loops"], strict=True)
        shown = (
            " + ".join(f"{turn} x {size}" for turn, size in loops),
            str(row["exponentials"]),
            *(f"{row[key]:.1f}" for key in ("in_loops", "whole")),
        )
        rows.append([f"`{row['kernel']}`", *shown, f"{row['us']:.0f}"])
    columns = ["kernel", "turns x instructions of a warp", "exponentials of a turn"]
    more = ["per 32 logits, in loops", "from start to end", "us per window"]
    print(grid([*columns, *more], rows), end="")


def cell(registers: int, spilled_bytes: int, shared_bytes: int) -> str:
    """As in the table of benchmarks/results/gpu/README.md."""
    return f"{registers} / {spilled_bytes} / {shared_bytes / 1024:.1f}"


def main() -> None:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--architectures",
        type=int,
        nargs="+",
        choices=ARCHITECTURES,
        default=ARCHITECTURES,
        help="compute capabilities; default: all",
    )
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    found = report(arguments.architectures)
    show(found)
    write_json(arguments.output, found, indent=2)


if __name__ == "__main__":
    main()

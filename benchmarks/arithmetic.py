"""What each kernel has to read, write and compute, and how long that takes at least.

Counted from shapes, nothing is measured. Counts are for one window of one request in all layers; memory
that two programs share is counted once, as if the L2 cache were perfect.
"""

from __future__ import annotations

from dataclasses import dataclass

from kara_sglang.benchmarks.models import Model


@dataclass(frozen=True, slots=True)
class Settings:
    """One window's settings.

    Attributes
    ----------
    window, kept, delay
        W, R and the delay, in tokens.
    query_bits
        Of one recorded number: 4, 8 or 16.
    mean
        The mean of each group is recorded instead of all its heads.
    """

    window: int = 512
    kept: int = 256
    delay: int = 64
    query_bits: int = 8
    mean: bool = False

    def voters(self, model: Model) -> int:
        """Recorded queries per KV head that vote: those of the window."""
        return self.window * (1 if self.mean else model.group)

    def head_bytes(self, model: Model) -> int:
        """Bytes of one recorded query of one head, its scales included."""
        scales = {4: 4 if model.head_dim <= 128 else 8, 8: 1, 16: 0}[self.query_bits]
        return model.head_dim * self.query_bits // 8 + scales


@dataclass(frozen=True, slots=True)
class Work:
    """What has to be done: ``bytes`` moved, ``flops`` on matrix units, ``exps`` base-2 exponentials."""

    bytes: int = 0
    flops: int = 0
    exps: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.exps + other.exps)

    def __mul__(self, factor: int) -> Work:
        return Work(self.bytes * factor, self.flops * factor, self.exps * factor)


@dataclass(frozen=True, slots=True)
class Gpu:
    """Ceilings of one GPU.

    Attributes
    ----------
    name
        And where the figures are from.
    bandwidth, flop_rate, exp_rate
        Bytes, bf16 matrix operations and exponentials per second.
    """

    name: str
    bandwidth: float
    flop_rate: float
    exp_rate: float

    def floor(self, work: Work) -> float:
        """Seconds that ``work`` takes at least: its slowest part, with perfect overlap."""
        return max(work.bytes / self.bandwidth, work.flops / self.flop_rate, work.exps / self.exp_rate)


# NVIDIA's datasheets of the SXM parts: memory bandwidth and dense bf16 rate. An SM makes 4096 dense
# bf16 operations per clock and 16 exponentials (CUDA C++ Programming Guide, arithmetic throughput,
# compute capability 9.0), so for these two the second rate is the first one's 256th.
DATASHEET = (
    Gpu("H100 SXM", 3.35e12, 989e12, 989e12 / 256),
    Gpu("H200 SXM", 4.8e12, 989e12, 989e12 / 256),
)


def record(model: Model, settings: Settings) -> Work:
    """One decode step of one recording request: queries read, and written to the ring."""
    written = model.kv_heads if settings.mean else model.query_heads
    stored = written * settings.head_bytes(model)
    return Work(bytes=model.layers * (model.query_heads * model.head_dim * 2 + stored))


def prepare(model: Model, settings: Settings) -> Work:
    """K and V read, turned keys and a weight of each written. K is read twice, the second time from
    the L2 cache."""
    numbers = settings.window * model.head_dim
    moved = (2 * model.kv_itemsize + 2) * numbers
    return Work(bytes=model.layers * model.kv_heads * (moved + 4 * settings.window))


def score(model: Model, settings: Settings) -> Work:
    """Both passes over queries and turned keys; the queries' log-sum-exps and scales are written by the
    first and read by the second, which reads the weights and writes the scores."""
    rows, width, dim = settings.voters(model), settings.window, model.head_dim
    queries, keys, sums = rows * settings.head_bytes(model), width * dim * 2, rows * 2 * 4
    per_pass = Work(bytes=queries + keys + sums, flops=2 * rows * width * dim, exps=rows * width)
    per_head = per_pass * 2 + Work(bytes=2 * 4 * width)
    return per_head * (model.layers * model.kv_heads)


def weights(model: Model, settings: Settings) -> Work:
    """The score without queries: K and V read, K once more from the L2 cache, scores written."""
    read = 2 * model.kv_itemsize * settings.window * model.head_dim
    return Work(bytes=model.layers * model.kv_heads * (read + 4 * settings.window))


def select(model: Model, settings: Settings) -> Work:
    """Scores read, blended scores and positions written; the logarithm of each score counts as an
    exponential, as does the blended score."""
    heads = model.layers * model.kv_heads
    numbers = 2 * settings.window
    return Work(bytes=heads * 4 * (numbers + settings.kept), exps=heads * numbers)


def compact(model: Model, settings: Settings) -> Work:
    """Kept rows of K and V read and written, where every one of them moves; positions and slots."""
    rows = 2 * model.layers * model.kv_heads * settings.kept
    return Work(bytes=rows * (2 * model.kv_itemsize * model.head_dim + 4 + 2 * 4))


PASS = (prepare, score, select, compact)
KERNELS = (record, *PASS, weights)


def pass_floor(model: Model, settings: Settings, gpu: Gpu) -> float:
    """Seconds that a pass over one window takes at least, its kernels one after the other."""
    return sum(gpu.floor(kernel(model, settings)) for kernel in PASS)


def decode_step(model: Model, batch: int, context: int) -> Work:
    """One decode step: the parameters, and the K and V of ``context`` tokens per request, read once."""
    return Work(bytes=round(model.parameters * 1e9) * 2 + batch * context * model.kv_bytes)

"""How to run a model fastest on this CPU: which dtype, and on how many threads.

Answers that are graded need no float32, and a processor with instructions for bfloat16 (AMX,
AVX512-BF16) multiplies several times as many of them. Machines differ, so it is measured.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass

import torch

DTYPES = ("float32", "bfloat16")
MODELS_OWN = "model"
"""What results say of answers on a GPU, which are given in the model's own dtype."""
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Pace:
    """What was found fastest.

    Attributes
    ----------
    dtype
        As SGLang's ``--dtype`` names it.
    threads
        For ``OMP_NUM_THREADS``.
    milliseconds
        Of one product of a decode step, by ``dtype/threads``.
    """

    dtype: str
    threads: int
    milliseconds: dict[str, float]


def fastest(model: str, batch: int) -> Pace:
    """Try the largest matrix of a layer of ``model``, a folder or hub name, on ``batch`` tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    return _fastest(config.hidden_size, config.intermediate_size, batch)


def _fastest(hidden: int, inner: int, batch: int) -> Pace:
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    took: dict[tuple[str, int], float] = {}
    try:
        for threads, dtype in itertools.product(sorted({1, cores}), DTYPES):
            torch.set_num_threads(threads)
            took[dtype, threads] = _time(hidden, inner, batch, getattr(torch, dtype))
    finally:
        torch.set_num_threads(before)
    dtype, threads = min(took, key=lambda choice: took[choice])
    return Pace(dtype, threads, {f"{d}/{t}": 1e3 * s for (d, t), s in took.items()})


def _time(hidden: int, inner: int, batch: int, dtype: torch.dtype) -> float:
    # More than one matrix, so that none is found in a cache; a model has dozens.
    matrices = [torch.randn(inner, hidden, dtype=dtype) for _ in range(4)]
    tokens = torch.randn(batch, hidden, dtype=dtype)
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        for matrix in matrices:
            torch.nn.functional.linear(tokens, matrix)
        best = min(best, (time.perf_counter() - started) / len(matrices))
    return best

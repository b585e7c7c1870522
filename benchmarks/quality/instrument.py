"""Forced decoding inside SGLang's scheduler: two hooks that exist in instrument mode only.

An answer is forced by replacing the sampled ids behind ``Sampler.forward``. A custom logit processor
could not do it: it edits the logits before every log-softmax, so a forced token would have probability
one. The step is read off the token's logical position, which a retraction does not disturb and which is
known to the forward batch itself, so that overlap scheduling cannot put it out of step.

The hooks are registered by an entry point of their own. It is no part of the installed package:
:func:`install` writes it into a folder that only the instrument's own processes have on their path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kara_sglang.benchmarks.quality import variants
from kara_sglang.benchmarks.quality.script import (
    FOLDER_ENV,
    ROW_KEY,
    SCRIPT_KEY,
    VARIANTS_ENV,
    Cell,
    Script,
    reference_path,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

NAME = "kara-quality"
REFERENCE_ROW = "full"
_ATTRIBUTE = "kara_quality_takes"


def install(folder: Path, name: str = NAME, module: str = __name__) -> Path:
    """Write the entry point of a plugin, ``register`` of ``module``; returns the folder that puts it on
    a process's path."""
    site = folder / "site"
    info = site / f"{name.replace('-', '_')}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {module}:register\n")
    return site


def register() -> None:
    """Called by SGLang's ``load_plugins()`` in an instrumented process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    variants.register(os.environ[VARIANTS_ENV].split())

    HookRegistry.register(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        after_init_forward_batch,
        HookType.AFTER,
    )
    HookRegistry.register("sglang.srt.layers.sampler.Sampler.forward", around_sampler, HookType.AROUND)


class Take:
    """One request that performs a script: what it has measured so far."""

    def __init__(self, folder: Path, script: str, row: str) -> None:
        self.folder, self.row = folder, row
        self.script = Script.load(folder, script)
        self.forced = self.script.forced
        self.prompt_len = len(self.script.prompt)
        measured, compared = self.script.measured(), self.script.compared()
        self._slot = {step: i for i, step in enumerate(measured)}
        self._compared = {step: i for i, step in enumerate(compared)}
        self._logprob = np.full(len(measured), np.nan)
        self._top = np.zeros(len(measured), dtype=bool)
        self._kv = np.zeros(len(measured), dtype=np.int64)
        self._kl = np.full(len(compared), np.nan)
        self._rows: np.ndarray | None = None  # the reference's log-probabilities

    def wants(self, step: int) -> bool:
        """Whether this step is measured."""
        return step in self._slot

    def measure(self, step: int, logits: torch.Tensor, kv_len: int) -> None:
        """Take one step's figures from its logits, shape ``(vocab,)``."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        token, slot = self.forced[step], self._slot[step]
        self._logprob[slot] = logprobs[token].item()
        self._top[slot] = int(logprobs.argmax()) == token
        self._kv[slot] = kv_len
        if step in self._compared:
            self._compare(self._compared[step], logprobs.cpu())

    def _compare(self, index: int, logprobs: torch.Tensor) -> None:
        path = reference_path(self.folder, self.script.name)
        if self.row == REFERENCE_ROW:
            if self._rows is None:
                self._rows = np.empty((len(self._compared), logprobs.shape[0]), dtype=np.float32)
            self._rows[index] = logprobs.numpy()
            return
        if self._rows is None:
            self._rows = np.load(path, mmap_mode="r")
        full = torch.from_numpy(np.array(self._rows[index])).double()
        self._kl[index] = (full.exp() * (full - logprobs.double())).sum().item()

    def finish(self) -> None:
        """The last token was forced: write the cell, and the reference before it."""
        if np.isnan(self._logprob).any() or (self.row != REFERENCE_ROW and np.isnan(self._kl).any()):
            raise RuntimeError(f"quality: {self.script.name} in {self.row}: steps were not measured")
        kl = self._kl.tolist()
        if self.row == REFERENCE_ROW:
            kl = []
            if self._rows is not None:
                path = reference_path(self.folder, self.script.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, self._rows)
        Cell(self._logprob.tolist(), self._top.tolist(), self._kv.tolist(), kl).save(
            self.folder, self.row, self.script.name
        )


_takes: dict[str, Take] = {}  # by request id


def after_init_forward_batch(
    result: ForwardBatch, _cls: Any, batch: ScheduleBatch, *_args: Any, **_kwargs: Any
) -> None:
    """AFTER ``ForwardBatch.init_new``: tell the sampler whose rows these are.

    ``sampling_info`` is this forward's own copy under overlap scheduling, and is set anew before each
    forward without it.
    """
    takes = [_take_of(req) for req in batch.reqs]
    lengths = result.seq_lens_cpu.tolist()
    setattr(result.sampling_info, _ATTRIBUTE, list(zip(batch.reqs, takes, lengths, strict=True)))


def _take_of(req: Any) -> Take | None:
    params = req.sampling_params.custom_params
    if not isinstance(params, dict) or SCRIPT_KEY not in params:
        return None
    take = _takes.get(req.rid)
    if take is None:
        take = Take(Path(os.environ[FOLDER_ENV]), params[SCRIPT_KEY], params[ROW_KEY])
        _takes[req.rid] = take
    return take


def around_sampler(
    original: Callable[..., torch.Tensor],
    sampler: Any,
    logits_output: Any,
    sampling_info: Any,
    return_logprob: bool,
    top_logprobs_nums: Any,
    token_ids_logprobs: Any,
    positions: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """AROUND ``Sampler.forward``: run stock, then put the forced ids in the sampled ones' place."""
    performed = getattr(sampling_info, _ATTRIBUTE, [])
    where = positions.tolist() if any(take is not None for _, take, _ in performed) else []
    logits = {}  # stock may turn them into probabilities in place
    steps: list[int | None] = [None] * len(performed)
    for row, position in enumerate(where):
        req, take, _ = performed[row]
        if take is None:
            continue
        step = position + 1 - take.prompt_len
        if not 0 <= step < len(take.forced):
            continue  # a chunk in the middle of a prompt, or a step in flight behind the last one
        steps[row] = step
        if take.wants(step):
            logits[row] = logits_output.next_token_logits[row].clone()
    ids = original(
        sampler,
        logits_output,
        sampling_info,
        return_logprob,
        top_logprobs_nums,
        token_ids_logprobs,
        positions,
        **kwargs,
    )
    for row, step in enumerate(steps):
        if step is None:
            continue
        req, take, kv_len = performed[row]
        ids[row] = take.forced[step]
        if row in logits:
            take.measure(step, logits[row], kv_len)
        if step == len(take.forced) - 1:
            take.finish()
            _takes.pop(req.rid, None)
    return ids

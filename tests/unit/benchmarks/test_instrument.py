"""What the quality benchmark reads off the engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kara_sglang.benchmarks.quality import instrument
from kara_sglang.benchmarks.quality.instrument import REFERENCE_ROW
from kara_sglang.benchmarks.quality.script import (
    FOLDER_ENV,
    ROW_KEY,
    SCRIPT_KEY,
    Cell,
    Probe,
    Script,
    cell_path,
    reference_path,
)

VOCAB = 50


class Server:
    """What the hooks see of SGLang: requests, positions, logits; greedy sampling."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(FOLDER_ENV, str(folder))
        self.seen: list[tuple[int, ...]] = []

    def request(self, rid: str, script: str | None, row: str = "row") -> SimpleNamespace:
        params = {SCRIPT_KEY: script, ROW_KEY: row} if script else None
        return SimpleNamespace(rid=rid, sampling_params=SimpleNamespace(custom_params=params))

    def step(self, requests: list, positions: list[int], logits: torch.Tensor) -> list[int]:
        info = SimpleNamespace()
        batch = SimpleNamespace(reqs=requests)
        forward = SimpleNamespace(
            sampling_info=info, seq_lens_cpu=torch.tensor([p + 1 for p in positions])
        )
        instrument.after_init_forward_batch(forward, None, batch)

        def stock(_sampler, output, *_args, **_kwargs) -> torch.Tensor:
            ids = output.next_token_logits.argmax(-1)
            output.next_token_logits.zero_()  # as sampling in place does
            return ids

        output = SimpleNamespace(next_token_logits=logits.clone())
        ids = instrument.around_sampler(
            stock, None, output, info, False, None, None, torch.tensor(positions)
        )
        return ids.tolist()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


def drawn(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed))


def perform(server: Server, script: Script, row: str, seed: int) -> list[torch.Tensor]:
    """All steps of one request; returns their logits."""
    request = server.request(f"{row}-{seed}", script.name, row)
    logits = [drawn(1, seed + i) for i in range(len(script.forced))]
    for i, row_logits in enumerate(logits):
        ids = server.step([request], [len(script.prompt) - 1 + i], row_logits)
        assert ids == [script.forced[i]]
    return logits


def test_forced_ids_measured_from_untouched_logits(server: Server, tmp_path: Path):
    script = Script("s", "x", [1, 2, 3], [7, 8, 9, 10], [Probe("text", 1, 4, True)], 2)
    script.save(tmp_path)
    full = perform(server, script, REFERENCE_ROW, 0)
    other = perform(server, script, "row", 100)
    cell = Cell.load(tmp_path, "row", "s")
    for place, step in enumerate((1, 2, 3)):
        p = torch.log_softmax(other[step][0], -1)
        assert cell.logprob[place] == pytest.approx(p[script.forced[step]].item(), abs=1e-6)
        assert cell.top[place] == (int(p.argmax()) == script.forced[step])
        assert cell.slots[place] == 3 + step
    for place, step in enumerate((1, 3)):
        p, q = (torch.log_softmax(x[step][0].double(), -1) for x in (full, other))
        expected = (p.exp() * (p - q)).sum().item()
        assert cell.kl[place] == pytest.approx(expected, rel=1e-5)
    assert Cell.load(tmp_path, REFERENCE_ROW, "s").kl == []
    assert np.load(reference_path(tmp_path, "s")).shape == (2, VOCAB)


def test_the_same_logits_have_no_divergence(server: Server, tmp_path: Path):
    script = Script("s", "x", [1], [7, 8, 9], [Probe("text", 0, 3, True)])
    script.save(tmp_path)
    perform(server, script, REFERENCE_ROW, 5)
    perform(server, script, "identity", 5)
    assert Cell.load(tmp_path, "identity", "s").kl == pytest.approx([0.0] * 3, abs=1e-6)


def test_the_step_follows_the_position_through_chunks_and_retraction(server: Server, tmp_path: Path):
    """A chunk in the middle of the prompt is not a step; a retracted request goes on where it was."""
    script = Script("s", "x", list(range(8)), [20, 21, 22, 23], [Probe("text", 0, 4)])
    script.save(tmp_path)
    request, other = server.request("a", "s"), server.request("b", None)
    chunk = drawn(1, 0)
    assert server.step([request], [3], chunk) == chunk.argmax(-1).tolist()
    assert server.step([request], [7], drawn(1, 1)) == [20]
    both = drawn(2, 2)
    assert server.step([other, request], [50, 8], both) == [int(both[0].argmax()), 21]
    # Retracted: prompt and answer so far are prefilled again, and the next token comes from there.
    assert server.step([request], [9], drawn(1, 3)) == [22]
    assert not cell_path(tmp_path, "row", "s").exists()
    assert server.step([request, other], [10, 51], drawn(2, 4))[0] == 23
    cell = Cell.load(tmp_path, "row", "s")
    assert cell.slots == [8, 9, 10, 11]
    # A step in flight behind the last one is stock's own.
    late = drawn(1, 5)
    assert server.step([request], [11], late) == late.argmax(-1).tolist()
    instrument._takes.clear()


def test_an_unmeasured_step_is_an_error(server: Server, tmp_path: Path):
    script = Script("s", "x", [1], [7, 8, 9], [Probe("text", 0, 3)])
    script.save(tmp_path)
    request = server.request("c", "s")
    server.step([request], [0], drawn(1, 0))
    with pytest.raises(RuntimeError, match="steps were not measured"):
        server.step([request], [2], drawn(1, 1))
    instrument._takes.clear()


def test_the_entry_point_exists_for_instrumented_processes_only(tmp_path: Path):
    from importlib.metadata import entry_points

    group = "sglang.srt.plugins"
    assert instrument.NAME not in {e.name for e in entry_points(group=group)}
    import sys

    sys.path.append(str(instrument.install(tmp_path)))
    try:
        (found,) = (e for e in entry_points(group=group) if e.name == instrument.NAME)
        assert found.load() is instrument.register
    finally:
        sys.path.pop()

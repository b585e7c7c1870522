"""When the hook in front of attention stores a step's queries."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode
from sglang.srt.server_args import ServerArgs

from kara_sglang.config import KaraConfig
from kara_sglang.kernels.backend import TorchKernels
from kara_sglang.kernels.record import PAGE, Ring, Step
from kara_sglang.scheduler import runtime
from kara_sglang.scheduler.ring.recorder import AttentionShape, QueryRecorder
from kara_sglang.scheduler.tails import Tails

LAYERS, GROUP, DIM = 3, 2, 4


class Layer:
    def __init__(self, layer_id: int) -> None:
        self.layer_id = layer_id


MODEL = [Layer(2 * place) for place in range(LAYERS)]
WINDOWED = Layer(1)  # sees the newest tokens only, so a pass leaves it alone
DRAFT = Layer(0)


class CountedKernels(TorchKernels):
    def __init__(self) -> None:
        super().__init__()
        self.layers = 0

    def record(self, ring: Any, step: Step, queries: list[torch.Tensor]) -> None:
        self.layers += len(queries)
        super().record(ring, step, queries)


def ring(budget: int) -> QueryRecorder:
    shape = AttentionShape(LAYERS, GROUP, 1, DIM, torch.float32, torch.device("cpu"))
    recorder = QueryRecorder(shape, 8, 2, budget, torch.float32, checked=True)
    recorder.allocate_tables(4)
    return recorder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[runtime.Runtime]:
    """A server that has started and serves, with a recorder that nobody has asked for yet."""
    recorder = ring(1 << 20)
    places = {layer: place for place, layer in enumerate(MODEL)}
    parts = runtime.Parts(KaraConfig(), CountedKernels(), "a test", recorder, places, 0, None)
    running = runtime.Runtime(parts)
    monkeypatch.setattr(runtime, "runtime", running)
    return running


def decode(rows: list[int], positions: list[int], mode: ForwardMode = ForwardMode.DECODE) -> None:
    """The hook's calls in one step."""
    batch = SimpleNamespace(
        forward_mode=mode,
        req_pool_indices=torch.tensor(rows),
        positions=torch.tensor(positions),
    )
    for layer in [DRAFT, MODEL[0], WINDOWED, *MODEL[1:]]:
        queries = torch.ones(len(positions), GROUP * DIM)
        runtime.before_attention(layer, queries, None, None, batch)


def test_a_graph_records_whenever_it_is_captured(started: runtime.Runtime) -> None:
    """At start, and again after `/update_weights_from_disk` with `recapture_cuda_graph`, while nobody
    records: who records during a replay is in the tables."""
    for _ in range(2):
        with model_capture_mode():
            decode([0, 0], [0, 0])
        assert started.parts.kernels.layers == LAYERS
        decode([1, 2], [5, 6])  # without a graph, for nobody
        assert started.parts.kernels.layers == LAYERS
        started.parts.kernels.layers = 0
    with model_capture_mode():
        decode([0, 0], [0, 0], ForwardMode.EXTEND)
    assert started.parts.kernels.layers == 0


def test_a_step_is_recorded_when_somebody_asks(started: runtime.Runtime) -> None:
    assert started.parts.recorder.extend(started.parts.recorder.acquire(1, GROUP, since=5, step=1), 5)
    started.parts.recorder.flush()
    decode([1, 2], [5, 6])
    assert started.parts.kernels.layers == LAYERS


def test_who_decodes_beside_a_prefill_is_recorded(started: runtime.Runtime) -> None:
    """The last tokens of the step, which SGLang may pad; a prefill alone records nobody."""
    recorder = started.parts.recorder
    assert recorder.extend(recorder.acquire(2, GROUP, since=9, step=1), 9)
    recorder.flush()
    step = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        req_pool_indices=torch.tensor([3, 1, 2]),
        positions=torch.tensor([0, 1, 2, 6, 9]),
    )
    queries = torch.arange(7.0)[:, None].expand(7, GROUP * DIM).contiguous()
    for decoding, count in (None, 0), (["one", "other"], LAYERS):
        started.tails = Tails.of(step, SimpleNamespace(decoding_reqs=decoding))
        for layer in MODEL:
            runtime.before_attention(layer, queries, None, None, step)
        assert started.parts.kernels.layers == count
    pages = recorder.active[2].pages[0]
    recorder.check.require("2", [[page] for page in pages], 9, 1)
    for page in pages:
        assert (recorder.ring.queries[:, page * PAGE + 9] == 4).all()


def test_a_pass_comes_before_each_check_of_a_step(started: runtime.Runtime) -> None:
    """And not before those of a retraction, which ask for the requests that would stay."""
    passes: list[object] = []
    started.coordinator = SimpleNamespace(before_decode=passes.append)
    runtime.before_check_decode_mem("batch")
    runtime.before_check_decode_mem("batch", selected_indices=[0])
    runtime.before_check_decode_mem("batch", [])
    assert passes == ["batch"]
    started.coordinator = None
    runtime.before_check_decode_mem("batch")
    assert passes == ["batch"]


def test_nothing_is_launched_without_a_ring(started: runtime.Runtime) -> None:
    """A server whose selector needs no queries, in a graph as well."""
    started.parts = dataclasses.replace(started.parts, recorder=ring(0))
    with model_capture_mode():
        decode([0], [0])
    decode([1], [5])
    assert started.parts.kernels.layers == 0


def test_the_ring_goes_and_comes_with_the_kv_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made in the region of torch_memory_saver that `/release_memory_occupation` gives back, and
    nothing else is: the scratch of a pass and the row tables stay."""
    inside: list[str] = []
    made: list[tuple[str, list[str]]] = []

    @contextmanager
    def region(tag: str) -> Iterator[None]:
        inside.append(tag)
        yield
        inside.pop()

    class Kernels(TorchKernels):
        def reserve(self, *_: Any) -> None:
            made.append(("scratch", inside[:]))

    def zeros(*arguments: Any) -> Ring:
        made.append(("ring", inside[:]))
        return ring_zeros(*arguments)

    def full(*arguments: Any, **rest: Any) -> torch.Tensor:
        made.append(("tables", inside[:]))
        return torch_full(*arguments, **rest)

    ring_zeros, torch_full = Ring.zeros, torch.full
    monkeypatch.setattr(Ring, "zeros", zeros)
    monkeypatch.setattr(runtime, "runtime", runtime.Runtime())
    monkeypatch.setattr(runtime, "pick", lambda device: (Kernels(), "a test"))
    config = KaraConfig(selector="snapkv", window=32, ahead=False, query_mem_gb=0.001)
    monkeypatch.setattr(runtime.plugin, "active", lambda: config)
    runner = SimpleNamespace(
        model=torch.nn.ModuleList(RadixAttention(GROUP, DIM, 0.5, 1, layer) for layer in range(LAYERS)),
        device="cpu",
        dtype=torch.float32,
        memory_saver_adapter=SimpleNamespace(region=region),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(4, 8)),
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace()),
        server_args=ServerArgs(model_path="none"),
        is_draft_worker=False,
    )
    runtime.after_load_model(None, runner)
    monkeypatch.setattr(torch, "full", full)
    runtime.before_cuda_graphs(runner)
    assert made == [("scratch", []), ("ring", ["kv_cache"]), ("tables", [])]
    assert runtime.runtime.parts.recorder.num_pages > 0 and not runtime.runtime.refused


def test_sglang_captures_decode_graphs_in_its_capture_mode() -> None:
    """All of them: what captures again makes a new runner of this class."""
    source = inspect.getsource(DecodeCudaGraphRunner.__init__)
    assert "with model_capture_mode():\n                self.capture()" in source

"""The GPU benchmark's own arithmetic, so that its first run on a GPU is not its first run."""

from __future__ import annotations

import pytest
import torch

from kara_sglang.benchmarks.gpu import floors, kernels
from kara_sglang.benchmarks.gpu.floors import Gpu, Settings, Work
from kara_sglang.benchmarks.gpu.models import MODELS, Model

TINY = Model("tiny", 2, 6, 2, 32, 0.001)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("rotating", [False, True])
def test_its_checks_pass_on_right_kernels_and_fail_on_wrong_ones(monkeypatch, rotating):
    monkeypatch.setattr(kernels, "DEVICE", torch.device("cpu"))
    settings = Settings(window=48, kept=16, delay=9, rotating=rotating)
    found = kernels.check(kernels.Case(TINY, settings, num_jobs=2, layers=2))
    assert found["score_error"] < 1e-4
    assert found["same_choice"] == 1.0

    monkeypatch.setattr(kernels, "compact", lambda *args, **kwargs: None)
    with pytest.raises(AssertionError, match="wrong result: compact"):
        kernels.check(kernels.Case(TINY, settings, num_jobs=2, layers=2))


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels.py"])
    with pytest.raises(SystemExit, match="no CUDA GPU here, nothing was measured"):
        kernels.main()


def test_floors_are_those_of_the_slowest_part():
    gpu = Gpu("", bandwidth=1e12, flop_rate=1e15, exp_rate=4e12)
    assert gpu.floor(Work(bytes=10**9, flops=10**10)) == pytest.approx(1e-3)
    assert gpu.floor(Work(bytes=10**6, flops=10**13)) == pytest.approx(1e-2)
    assert gpu.floor(Work(exps=8 * 10**9)) == pytest.approx(2e-3)


def test_counts_of_one_window_by_hand():
    """Qwen3-8B: 36 layers, 8 KV heads of 4 query heads, 128 numbers each; W 512, R 256, delay 64."""
    model, settings = MODELS[0], Settings()
    queries = 576 * 4
    assert floors.score(model, settings).flops == 36 * 8 * 2 * (2 * queries * 512 * 128)
    assert floors.score(model, settings).exps == 36 * 8 * 2 * (queries * 512)
    assert floors.compact(model, settings).bytes == 36 * 8 * 2 * 256 * (2 * 256 + 8 + 8)
    assert floors.record(model, settings).bytes == 36 * 32 * 128 * (2 + 1)
    assert model.kv_bytes == 147_456

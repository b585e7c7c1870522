"""The GPU benchmark's own arithmetic, so that its first run on a GPU is not its first run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from kara_sglang.benchmarks.gpu import compiled, floors, identity, kernels, paged_decode
from kara_sglang.benchmarks.gpu.floors import Gpu, Settings, Work
from kara_sglang.benchmarks.gpu.models import MODELS, Model
from kara_sglang.kernels.record import FP8
from kara_sglang.kernels.triton import backend

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
TINY = Model("tiny", 2, 6, 2, 32, 0.001)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("mean", [False, True])
def test_its_checks_pass_on_right_kernels_and_fail_on_wrong_ones(monkeypatch, mean):
    monkeypatch.setattr(kernels, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(kernels, "captured", lambda call: call)
    settings = Settings(window=48, kept=16, delay=9, mean=mean)
    found = kernels.check(kernels.Case(TINY, settings, num_jobs=2, layers=2))
    assert found["score_error"] < 1e-4 < found["turned_score_error"] < 0.03
    assert found["weight_error"] < 1e-4
    assert found["same_choice"] == 1.0

    if mean:
        monkeypatch.setattr(kernels, "captured", lambda call: lambda: None)
        with pytest.raises(AssertionError, match="wrong result: record in a replayed graph"):
            kernels.check(kernels.Case(TINY, settings, num_jobs=2, layers=1))
    else:
        monkeypatch.setattr(kernels, "compact", lambda *args, **kwargs: None)
        with pytest.raises(AssertionError, match="wrong result: compact"):
            kernels.check(kernels.Case(TINY, settings, num_jobs=2, layers=1))


@pytest.mark.usefixtures("interpreted")
def test_its_checks_take_other_types(monkeypatch):
    monkeypatch.setattr(kernels, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(kernels, "captured", lambda call: call)
    settings = Settings(window=48, kept=16, delay=9, query_bytes=2)
    kernels.check(kernels.Case(TINY, settings, num_jobs=1, layers=1, key_dtype=FP8))


def test_what_it_leaves_when_a_case_crashes(monkeypatch, tmp_path):
    """The report is written after each case: one is measured, the second crashes."""
    taken = iter([{name: {} for name in ("record", "select")} | MEASURED])
    monkeypatch.setattr(kernels, "Case", lambda *args, **kwargs: MagicMock())
    monkeypatch.setattr(kernels, "check", lambda case: {"score_error": 0.0})
    monkeypatch.setattr(kernels, "measured_ceilings", lambda: Gpu("it", 1e12, 1e15, 4e12))
    monkeypatch.setattr(kernels, "measure", lambda case, gpu: next(taken))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    output = tmp_path / "new" / "kernels.json"
    monkeypatch.setattr("sys.argv", ["kernels.py", "--windows", "1024", "--output", str(output)])
    with pytest.raises(StopIteration):
        kernels.main()
    report = json.loads(output.read_text())
    assert len(report["checks"]) == len(kernels.OTHER_CASES)
    assert set(report["versions"]) == {"torch", "triton", "cuda", "driver", "python"}
    (run,) = report["runs"]
    met = {name.split(",")[0]: goal["met"] for name, goal in run["goals"].items()}
    assert met == {"compact": True, "pass": True, "score": False}
    assert list(output.parent.iterdir()) == [output]


MEASURED = {
    "compact": {"bytes_per_s": 0.81e12},
    "score": {"flop_per_s": 0.49e15},
    "pass": {"share_of_decode_floor": 0.009},
}


def test_exponentials_are_counted_per_sm_and_clock():
    """An H100 SXM: 132 SMs at 1.98 GHz at most."""
    rate = kernels.exp_rate({"multiprocessor_count": 132, "sm_clock_rate": 1_980_000})
    assert rate == pytest.approx(4.18e12, rel=1e-3)


class PlainFlashInfer:
    """FlashInfer's paged decode by its definition; as many arguments of it as the script passes."""

    __version__ = "plain"

    def __init__(self, workspace, layout) -> None:
        assert layout == "NHD"

    def plan(self, indptr, indices, last, qo_heads, kv_heads, dim, page, *, q_data_type, kv_data_type):
        self.table = indptr, indices.long(), last, page

    def run(self, queries, paged):
        indptr, indices, last, page = self.table
        out = torch.empty(queries.shape)
        for i, query in enumerate(queries.float()):
            pages = indices[indptr[i] : indptr[i + 1]]
            length = (len(pages) - 1) * page + int(last[i])
            k, v = (b[pages].flatten(0, 1)[:length].float().transpose(0, 1) for b in paged)
            logits = query.view(len(k), -1, query.shape[1]) @ k.transpose(1, 2)
            out[i] = ((logits * query.shape[1] ** -0.5).softmax(-1) @ v).flatten(0, 1)
        return out


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("page", [1, 16])
def test_the_check_with_flashinfer(monkeypatch, make, page):
    monkeypatch.setattr(paged_decode, "DEVICE", torch.device("cpu"))
    for name, value in {"HEADS": 2, "GROUP": 2, "DIM": 16, "SLOTS": 512}.items():
        monkeypatch.setattr(paged_decode, name, value)
    library = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PlainFlashInfer)
    kernels = make.kernels()
    assert paged_decode.check(library, kernels, page, width=48, kept=16) < 1e-3
    monkeypatch.setattr(backend, "compact", lambda *args: None)
    assert paged_decode.check(library, kernels, page, width=48, kept=16) > 0.02


def test_without_flashinfer_or_gpu_it_says_so(monkeypatch):
    with pytest.raises(SystemExit, match="no CUDA GPU here, nothing was checked"):
        paged_decode.main()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(SystemExit, match="flashinfer cannot be imported"):
        paged_decode.main()


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
    queries = 512 * 4  # those of the delay do not vote
    assert floors.score(model, settings).flops == 36 * 8 * 2 * (2 * queries * 512 * 128)
    logs = (1 + 13) * 512  # of each token, its own among its neighbours' and once more
    assert floors.score(model, settings).exps == 36 * 8 * (2 * queries * 512 + logs + 512)
    assert floors.compact(model, settings).bytes == 36 * 8 * 2 * 256 * (2 * 256 + 4 + 8)
    assert floors.record(model, settings).bytes == 36 * 32 * (128 * (2 + 1) + 1)
    assert model.kv_bytes == 147_456


@pytest.mark.parametrize("program", [floors, compiled], ids=["floors", "compiled"])
def test_the_documented_tables_are_the_committed_results(program, capsys):
    name = program.__name__.rpartition(".")[2]
    program.show(json.loads((RESULTS / f"{name}.json").read_text()))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert set(rows) <= set((ROOT / "docs" / "kernels.md").read_text().splitlines())


def test_the_committed_floors_are_what_the_program_counts(monkeypatch, tmp_path):
    output = tmp_path / "new" / "floors.json"
    monkeypatch.setattr("sys.argv", ["floors.py", "--output", str(output)])
    floors.main()
    ours, committed = (json.loads(path.read_text()) for path in (output, RESULTS / "floors.json"))
    assert ours.pop("versions").keys() == committed.pop("versions").keys()
    assert ours == committed


class FakeServer:
    """Answers as a stock or identity server would; ``differs`` is a token that the latter changes."""

    differs: int | None = None
    windows = identity.WINDOWS
    running = 0

    def __init__(self, peer, row, setup, log) -> None:
        assert FakeServer.running == 0, "two servers on one GPU"
        FakeServer.running += 1
        self.command = peer.command(row, setup, 1)
        self.ours = row.name == "identity"
        checks = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "SGLANG_CHECK_KV_PAGE_INVARIANTS"}
        assert peer.environment(row, setup).keys() >= checks

    def wait(self) -> FakeServer:
        return self

    def stop(self) -> None:
        FakeServer.running -= 1

    def post(self, path, body):
        count = body["sampling_params"]["max_new_tokens"]
        prompts = body["text"] if isinstance(body["text"], list) else [body["text"]]
        answers = []
        for prompt in prompts:
            scored = [(-0.5, len(prompt) + i, None) for i in range(count)]
            info = {"output_token_logprobs": scored}
            if self.ours:
                info["kv_compress"] = {"windows": self.windows}
                if self.differs is not None and prompt == identity.PROMPTS[2]:
                    scored[self.differs - 1] = (-0.75, scored[self.differs - 1][1], None)
                    scored[self.differs] = (-0.5, 0, None)
            answers.append({"meta_info": info})
        return SimpleNamespace(json=lambda: answers if isinstance(body["text"], list) else answers[0])


@pytest.mark.parametrize(("differs", "windows"), [(None, 3), (7, 3), (None, 2)])
def test_identity_fails_where_tokens_differ_or_no_pass_ran(monkeypatch, tmp_path, differs, windows):
    output = tmp_path / "identity.json"
    monkeypatch.setattr(identity, "Server", FakeServer)
    monkeypatch.setattr(identity, "end_on_sigterm", lambda: None)
    monkeypatch.setattr(FakeServer, "differs", differs)
    monkeypatch.setattr(FakeServer, "windows", windows)
    words = ["identity.py", "--model", "m", "--backends", "triton", "fa3", "--output", str(output)]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(identity.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    assert identity.main() == (0 if differs is None and windows == 3 else 1)
    assert FakeServer.running == 0
    found = json.loads(output.read_text())["backends"]
    assert list(found) == ["triton", "fa3"]
    if windows == 2:
        assert "windows were compressed, 3 each were due" in found["fa3"]["failed"]
        return
    single, control = found["fa3"]["one_by_one"], found["fa3"]["stock_twice_all_at_once"]
    assert control == {"answers": 8, "equal": 8, "part_at": [], "logprob_difference": 0.0}
    assert single["part_at"] == ([] if differs is None else [{"prompt": 2, "token": 7}])
    assert single["equal"] == (8 if differs is None else 7)
    assert single["logprob_difference"] == (0.0 if differs is None else 0.25)

"""The GPU benchmark's own arithmetic, so that its first run on a GPU is not its first run."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from places import ROOT

from kara_sglang.benchmarks import arithmetic
from kara_sglang.benchmarks.arithmetic import Gpu, Settings, Work
from kara_sglang.benchmarks.gpu import (
    case,
    checks,
    compiled,
    floors,
    host,
    identity,
    kernels,
    paged_decode,
    tables,
    tiles,
    timing,
)
from kara_sglang.benchmarks.models import MODELS, Model
from kara_sglang.kernels.record import FP8
from kara_sglang.kernels.triton import backend, score

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
TINY = Model("tiny", 2, 6, 2, 32, 0.001)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("mean", [False, True])
def test_its_checks_pass_on_right_kernels_and_fail_on_wrong_ones(monkeypatch, mean):
    monkeypatch.setattr(case, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(checks, "captured", lambda call: call)
    settings = Settings(window=48, kept=16, delay=9, mean=mean)
    found = checks.check(case.Case(TINY, settings, num_jobs=2, layers=2))
    assert found["score_error"] < 1e-4 < found["turned_score_error"] < 0.005
    assert found["weight_error"] < 1e-4
    assert found["same_choice"] > 0.99  # near ties may fall either way

    if mean:
        monkeypatch.setattr(checks, "captured", lambda call: lambda: None)
        with pytest.raises(AssertionError, match="wrong result: record in a replayed graph"):
            checks.check(case.Case(TINY, settings, num_jobs=2, layers=1))
    else:
        monkeypatch.setattr(case, "compact", lambda *args: [])
        with pytest.raises(AssertionError, match="wrong result: compact"):
            checks.check(case.Case(TINY, settings, num_jobs=2, layers=1))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("bits", [4, 16])
def test_its_checks_take_other_types(monkeypatch, bits):
    monkeypatch.setattr(case, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(checks, "captured", lambda call: call)
    settings = Settings(window=48, kept=16, delay=9, query_bits=bits)
    checks.check(case.Case(TINY, settings, num_jobs=1, layers=1, key_dtype=FP8))


@pytest.mark.usefixtures("interpreted")
def test_the_stress_of_compact_sees_a_wrong_byte(monkeypatch):
    monkeypatch.setattr(case, "DEVICE", torch.device("cpu"))
    windows = case.Case(TINY, Settings(window=48, kept=16, delay=9), num_jobs=2, layers=2)
    right, moved = windows.compact, []
    monkeypatch.setattr(windows, "compact", lambda: (right(), moved.append(windows.kept.clone())))
    checks.stress_compact(windows, 3)
    worst = torch.arange(1, 17).expand(2, 2, 2, 16)  # every row is written right after it was read
    assert len(moved) == 3 and all(torch.equal(kept, worst) for kept in moved)
    monkeypatch.setattr(windows, "compact", lambda: (right(), windows.pool.values[1][:, 1].mul_(2)))
    with pytest.raises(AssertionError, match="wrong result: move 0"):
        checks.stress_compact(windows, 1)


@pytest.mark.usefixtures("interpreted")
def test_tiles_reports_what_fails_and_goes_on(monkeypatch, tmp_path, capsys):
    """Sizes that fail, or that compute something else, are left out of the tables."""

    def times(call, repeats):
        call()
        return dict.fromkeys(("log_sum_exp_kernel", "column_sum_kernel", "prepare_kernel"), 80.0)

    monkeypatch.setattr(case, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tiles, "MODELS", [TINY])
    monkeypatch.setattr(tiles, "launch_times", times)
    monkeypatch.setattr(tiles, "LOG_SUM_EXP", [score.Tile(16, 16, 4, 2), score.Tile(17, 16, 4, 2)])
    monkeypatch.setattr(tiles, "COLUMN_SUM", [score.Tile(16, 16, 4, 2)])
    monkeypatch.setattr(tiles, "PREPARE", [(512, 4, 2), (512, 4, 3)])
    found = iter([1e-3] * 6 + [float("nan")])  # three sizes of two cases each, then a wrong one
    monkeypatch.setattr(tiles, "relative", lambda ours, theirs: next(found))
    output = tmp_path / "tiles.json"
    words = ["tiles.py", "--window", "48", "--jobs", "1", "2", "--output", str(output)]
    monkeypatch.setattr("sys.argv", words)
    tiles.main()
    results = json.loads(output.read_text())["results"]
    assert [each["us_per_window"] for each in results if "failed" not in each] == [[80.0, 40.0]] * 3
    failed = {each["label"]: each["failed"] for each in results if "failed" in each}
    assert failed["512 numbers, 4 warps, 3 programs"] == "relative error nan"
    assert len(failed) == 2 and "InterpreterError" in failed["17 queries, 16 keys, 4 warps, 2 stages"]
    printed = capsys.readouterr().out
    assert printed.count("80.0") == 6 and printed.count("InterpreterError") == 1


def test_what_it_leaves_when_a_case_crashes(monkeypatch, tmp_path):
    """The report is written after each case: one is measured, the second crashes."""
    taken = iter([{name: {} for name in ("record", "select")} | MEASURED])
    monkeypatch.setattr(kernels, "Case", lambda *args, **kwargs: MagicMock())
    monkeypatch.setattr(kernels, "check", lambda case: {"score_error": 0.0})
    monkeypatch.setattr(kernels, "stress_compact", lambda case, moves: None)
    monkeypatch.setattr(kernels, "measured_ceilings", lambda: Gpu("it", 1e12, 1e15, 4e12))
    monkeypatch.setattr(kernels, "measure", lambda case, gpu: next(taken))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    output = tmp_path / "new" / "kernels.json"
    monkeypatch.setattr("sys.argv", ["kernels.py", "--windows", "1024", "--output", str(output)])
    with pytest.raises(StopIteration):
        kernels.main()
    report = json.loads(output.read_text())
    assert len(report["checks"]) == len(kernels.OTHER_CASES) + 1
    assert set(report["versions"]) == {"torch", "triton", "cuda", "driver", "python"}
    (run,) = report["runs"]
    met = {name.split(",")[0]: goal["met"] for name, goal in run["goals"].items()}
    assert met == {"compact": True, "pass": True, "score": False}
    assert list(output.parent.iterdir()) == [output]


MEASURED = {
    "compact": {"bytes_per_s": 0.81e12},
    "score": {"of_floor": 0.49},
    "pass": {"share_of_decode_floor": 0.009},
}


def test_exponentials_are_counted_per_sm_and_clock():
    """An H100 SXM: 132 SMs at 1.98 GHz at most."""
    rate = timing.exp_rate({"multiprocessor_count": 132, "sm_clock_rate": 1_980_000})
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
    monkeypatch.setattr(backend, "compact", lambda *args: [])
    assert paged_decode.check(library, kernels, page, width=48, kept=16) > 0.02


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_the_check_with_flashinfer_leaves_a_result(monkeypatch, tmp_path, error):
    output = tmp_path / "paged_decode.json"
    monkeypatch.setattr("sys.argv", ["paged_decode.py", "--output", str(output)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(paged_decode, "kind", lambda: "a GPU")
    monkeypatch.setattr(paged_decode, "TritonKernels", MagicMock)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(__version__="1"))
    monkeypatch.setattr(paged_decode, "check", lambda *args, **kwargs: error)
    if error == 0.01:
        paged_decode.main()
    else:
        with pytest.raises(SystemExit, match="does not see the retained tokens"):
            paged_decode.main()
    found = json.loads(output.read_text())
    assert found["gpu"] == "a GPU" and found["versions"]["flashinfer"] == "1"
    assert len(found["largest_difference"]) == (3 if error == 0.01 else 1)


def test_without_flashinfer_or_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["paged_decode.py"])
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
    assert arithmetic.score(model, settings).flops == 36 * 8 * 2 * (2 * queries * 512 * 128)
    assert arithmetic.score(model, settings).exps == 36 * 8 * 2 * queries * 512
    assert arithmetic.prepare(model, settings).bytes == 36 * 8 * (3 * 512 * 128 * 2 + 512 * 4)
    assert arithmetic.select(model, settings).exps == 36 * 8 * 512 * (
        1 + 1
    )  # a logarithm, and its power
    assert arithmetic.compact(model, settings).bytes == 36 * 8 * 2 * 256 * (2 * 256 + 4 + 8)
    assert arithmetic.record(model, settings).bytes == 36 * 32 * (128 * (2 + 1) + 1)
    assert model.kv_bytes == 147_456


@pytest.mark.parametrize("program", [floors, compiled, host], ids=["floors", "compiled", "host"])
def test_the_documented_tables_are_the_committed_results(program, capsys):
    name = program.__name__.rpartition(".")[2]
    program.show(json.loads((RESULTS / f"{name}.json").read_text()))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 3
    assert set(rows) <= set(
        (ROOT / "benchmarks" / "results" / "gpu" / "README.md").read_text().splitlines()
    )


@pytest.mark.parametrize("document", ["README.md", "docs/kernels.md"])
def test_the_documented_tables_of_gpus_are_the_committed_results(document):
    """A mark without its result fails: render raises."""
    text = (ROOT / document).read_text()
    assert tables.render(text) == text


def test_what_awaits_a_gpu_is_said_as_long_as_it_does():
    awaited = not (RESULTS / "kernels-h100.json").exists()
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/kernels.md"))
    assert ("awaits a GPU" in readme) == awaited
    assert ("awaits a GPU" in page) == awaited == ("<!-- gpu:kernels-h100 " not in page)


def test_tables_of_a_gpu(tmp_path):
    names = ("record", "weights", "score", "select", "compact")
    done = {name: {"us": 99.6, "of_floor": 0.5} for name in names}
    took = {"prepare_kernel": 1.0, "log_sum_exp_kernel": 2.0, "select_kernel": 4.0, "Memcpy": 5.0}
    done["pass"] = {"one_window_us": 20.0, "one_window_launches_us": took, "us": 40.0}
    done["pass"]["launches_us"] = {name: 2 * us for name, us in took.items()}
    done["pass without queries"] = done["pass"]
    run = {
        "model": "M",
        "settings": {"window": 512, "mean": True, "query_bits": 4},
        "jobs": 8,
        "kernels": done,
    }
    (tmp_path / "it.json").write_text(json.dumps({"runs": [run]}))
    views = ("it kernels", "it passes")
    marks = "".join(f"<!-- gpu:{view} -->\nold\n<!-- end of gpu -->\n" for view in views)
    lines = tables.render(marks, tmp_path).splitlines()
    assert lines[3] == "| M, W 512, mean, fp4 | 8 |" + " 100 (50%) |" * 5
    assert lines[-5] == "| M, W 512, mean, fp4 | 1 | 1 | 2 | 0 | 4 | 0 | 12 | 20 |"
    assert lines[-2] == "| M, W 512, mean, fp4, `keys` | 8 | 2 | 4 | 0 | 8 | 0 | 24 | 40 |"
    with pytest.raises(FileNotFoundError, match=r"another\.json"):
        tables.render(marks.replace("it ", "another "), tmp_path)
    with pytest.raises(ValueError, match="a mark is gpu:RESULT VIEW with kernels or passes"):
        tables.render(marks.replace("passes", "floors"), tmp_path)


def test_what_a_pass_costs_the_host(tmp_path):
    """In a process of its own, whose driver of Triton is stood in for."""
    output = tmp_path / "host.json"
    command = [sys.executable, "-m", host.__name__, "--repeats", "300", "--output", str(output)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    found = json.loads(output.read_text())
    assert [(row["windows"], row["launches"]) for row in found["rows"]] == [(1, 5), (8, 20)]
    assert found["rows"][0]["without_launches_us"] < found["goal_us"]


def test_the_committed_floors_are_what_the_program_counts(monkeypatch, tmp_path):
    output = tmp_path / "new" / "floors.json"
    monkeypatch.setattr("sys.argv", ["floors.py", "--output", str(output)])
    floors.main()
    ours, committed = (json.loads(path.read_text()) for path in (output, RESULTS / "floors.json"))
    assert ours.pop("versions").keys() == committed.pop("versions").keys()
    assert ours == committed


class FakeServer:
    """Answers as a stock or compressing server would; ``differs`` is a token that the latter changes in
    requests that ask for ``wrong``."""

    differs: int | None = None
    wrong = "identity"
    windows = identity.WINDOWS
    without_queries = 0
    running = 0

    def __init__(self, peer, row, setup, log) -> None:
        assert FakeServer.running == 0, "two servers on one GPU"
        FakeServer.running += 1
        self.command = peer.command(row, setup, 1)
        self.ours = row.name == "kara-0.5"
        self.log = log
        self.log.write_text("Decode batch, #running-req: 1, #token: 1, cuda graph: True, x\n")
        ring = self.command[self.command.index("--kv-compress-query-mem-gb") + 1] if self.ours else "1"
        assert float(ring) > 0, "queries are recorded in the graphs"
        checks = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "SGLANG_CHECK_KV_PAGE_INVARIANTS"}
        assert peer.environment(row, setup).keys() >= checks

    def wait(self) -> FakeServer:
        return self

    def stop(self) -> None:
        FakeServer.running -= 1

    def log_since(self, position):
        return self.log.read_text()

    def get(self, path):
        assert path == "/server_info"
        info = {"disable_cuda_graph": False, "disable_overlap_schedule": False, "more": 1}
        return SimpleNamespace(json=lambda: info)

    def post(self, path, body):
        if path == "/flush_cache":
            return None
        batch = isinstance(body["text"], list)
        texts = body["text"] if batch else [body["text"]]
        every = body["sampling_params"] if batch else [body["sampling_params"]]
        answers = [self.answer(text, params) for text, params in zip(texts, every, strict=True)]
        return SimpleNamespace(json=lambda: answers if batch else answers[0])

    def answer(self, prompt, params):
        scored = [(-0.5, len(prompt) + i, None) for i in range(params["max_new_tokens"])]
        info = {"output_token_logprobs": scored}
        assert ("custom_params" in params) == self.ours, "stock is told nothing"
        if self.ours:
            options = params["custom_params"]["kv_compress"]
            name = options["selector"] if options else "opted out"
            info["kv_compress"] = {
                "windows": self.windows if options else 0,
                "without_queries": self.without_queries if name == "kara" else 0,
            }
            if name == "kara":
                scored[:] = [(-1.0, 1, None)] * len(scored)
            elif self.differs is not None and name == self.wrong and prompt == identity.PROMPTS[2]:
                scored[self.differs - 1] = (-0.75, scored[self.differs - 1][1], None)
                scored[self.differs] = (-0.5, 0, None)
        return {"meta_info": info}


def identity_of(monkeypatch, tmp_path) -> tuple[int, dict]:
    """Exit code and result for two backends."""
    output = tmp_path / "identity.json"
    monkeypatch.setattr(identity, "start", FakeServer)
    monkeypatch.setattr(identity, "end_on_sigterm", lambda: None)
    words = ["identity.py", "--model", "m", "--backends", "triton", "fa3", "--output", str(output)]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(identity.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    code = identity.main()
    assert FakeServer.running == 0
    found = json.loads(output.read_text())["backends"]
    assert list(found) == ["triton", "fa3"]
    return code, found["fa3"]


def test_identity_passes_on_equal_tokens(monkeypatch, tmp_path):
    code, found = identity_of(monkeypatch, tmp_path)
    assert code == 0
    rounds = ("one_by_one", "opted_out_one_by_one", "beside_kara", "stock_twice_all_at_once")
    for name in rounds:
        assert found[name] == {"answers": 8, "equal": 8, "part_at": [], "logprob_difference": 0.0}
    on = {"disable_cuda_graph": False, "disable_overlap_schedule": False, "steps_without_graph": 0.0}
    assert found["servers"] == {"stock": on, "kara-0.5": on}


@pytest.mark.parametrize(
    ("wrong", "name"), [("identity", "one_by_one"), ("opted out", "opted_out_one_by_one")]
)
def test_identity_fails_where_tokens_differ(monkeypatch, tmp_path, wrong, name):
    monkeypatch.setattr(FakeServer, "differs", 7)
    monkeypatch.setattr(FakeServer, "wrong", wrong)
    code, found = identity_of(monkeypatch, tmp_path)
    assert code == 1
    expected = {"answers": 8, "equal": 7, "part_at": [{"prompt": 2, "token": 7}]}
    assert found[name] == expected | {"logprob_difference": 0.25}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("windows", 2, "windows were compressed"),
        ("without_queries", 1, "8 windows had no queries; give more --query-mem-gb"),
    ],
)
def test_identity_fails_where_passes_did_not_run_as_they_must(
    monkeypatch, tmp_path, name, value, message
):
    monkeypatch.setattr(FakeServer, name, value)
    code, found = identity_of(monkeypatch, tmp_path)
    assert code == 1 and message in found["failed"]


def test_identity_asks_the_backends_that_are_installed(monkeypatch, tmp_path):
    for package in ("triton", "sgl_kernel"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for package in ("triton", "sgl_kernel", "flashinfer"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    assert identity.backends_here() == ["triton"]
    (tmp_path / "sgl_kernel" / "flash_ops.abi3.so").touch()
    assert identity.backends_here() == ["triton", "fa3"]

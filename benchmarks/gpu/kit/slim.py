"""Empties the code in ``sgl_kernel``'s FlashAttention library that bf16 models on Hopper never run.

``flash_ops.abi3.so`` of sglang-kernel 0.4.5 holds 1.1 GB of uncompressed machine code: fat binaries
for three architectures, each with all element types and head sizes. Those that are not wanted
become zeros, which a compressor takes for nothing; the file keeps its size, its symbols and its
host code. The CUDA runtime loads a fat binary when its first kernel is launched (lazy loading, the
default), so an empty one is never looked at. With ``CUDA_MODULE_LOADING=EAGER`` the library would
not load.
"""

from __future__ import annotations

import mmap
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

HEAD_DIMS = (64, 128)
HOPPER = 90
_FATBIN_MAGIC = 0xBA55ED50
_SYMTAB, _FUNCTION = 2, 2
# Head size of K and V and the element in a mangled kernel's name: the tile's third number may be
# written out, or be a reference to one that was.
_FORWARD = re.compile(
    rb"CollectiveMainloopFwdSm90ILi\d+EN4cute5tupleIJ\w{1,40}?EEENS\w_IJ(?:NS\w_ILi\d+EEE|S\w_){2}"
    rb"(?:NS\w_ILi(\d+)EEE|S\w_)EEELi(\d+)ENS\w{0,2}_10bfloat16_tE"
)
_HELPERS = (b"FlashAttnFwdCombine", b"prepare_varlen_num_blocks")


def slim(source: Path, target: Path) -> tuple[int, int]:
    """Write ``source`` to ``target`` without the code that is not wanted.

    Returns
    -------
    tuple of int
        Pieces of machine code that are kept, and that there were.

    Raises
    ------
    ValueError
        Where ``source`` has no GPU code, or none that is wanted: another version of the library.
    """
    shutil.copyfile(source, target)
    kept = count = 0
    with source.open("rb") as file, target.open("r+b") as out:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for architecture, start, size in _machine_code(data):
            count += 1
            if architecture == HOPPER and _wanted(data[start : start + size]):
                kept += 1
                continue
            out.seek(start)
            out.write(bytes(size))
    if not kept:
        raise ValueError(f"{source.name} holds no code for bf16 heads of {HEAD_DIMS} on Hopper")
    return kept, count


def _machine_code(data: mmap.mmap) -> Iterator[tuple[int, int, int]]:
    """Architecture, start and size of every piece in the file's fat binaries."""
    place, end = _fatbin_section(data)
    while place < end:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, place)
        if magic != _FATBIN_MAGIC:  # padding
            place += 8
            continue
        entry, stop = place + header, place + header + length
        while entry < stop:
            _, _, head, size = struct.unpack_from("<HHIQ", data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            yield architecture, entry + head, size
            entry += head + size
        place = stop


def _fatbin_section(data: mmap.mmap) -> tuple[int, int]:
    """Start and end of ``.nv_fatbin`` in an ELF file of 64 bits."""
    for name, section in _sections(data):
        if name == b".nv_fatbin":
            return section[4], section[4] + section[5]
    raise ValueError("the library holds no GPU code")


def _sections(data: bytes | mmap.mmap) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        yield bytes(data[start : data.find(b"\0", start)]), header


def _wanted(code: bytes) -> bool:
    return any(_is_wanted(name) for name in _functions(code))


def _is_wanted(name: bytes) -> bool:
    if name.startswith(b"$"):
        return False
    if any(helper in name for helper in _HELPERS):
        return True
    found = _FORWARD.search(name)
    return found is not None and int(found[2]) in HEAD_DIMS and found[1] in (None, found[2])


def _functions(code: bytes) -> Iterator[bytes]:
    """Names of the functions that a piece of machine code defines."""
    if code[:4] != b"\x7fELF":
        return
    headers = [header for _, header in _sections(code)]
    for header in headers:
        if header[1] != _SYMTAB:
            continue
        strings = headers[header[6]][4]
        for i in range(header[5] // 24):
            name, info, *_, size = struct.unpack_from("<IBBHQQ", code, header[4] + 24 * i)
            if info & 15 == _FUNCTION and size:
                start = strings + name
                yield code[start : code.index(b"\0", start)]

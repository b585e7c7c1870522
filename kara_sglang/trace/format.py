"""One file per request: its tokens, its windows, and one bit per token, layer and KV head."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kara_sglang.radix_integration.row import VOTERS

FORMAT, VERSION = "kara_sglang.trace", 2
_ARRAYS = ("prompt_ids", "output_ids", "windows", "bits")
_LONGEST_NAME = 100  # a request id may be of any length, a file name may not


class TraceError(ValueError):
    """A file is no trace, or several do not belong together; one line."""


@dataclass(frozen=True, slots=True)
class About:
    """What a trace says besides its arrays.

    Attributes
    ----------
    rid
        The request's id, as SGLang knows it.
    finish
        Why it ended: SGLang's type, ``length``, ``stop`` or ``abort``.
    retractions
        How often SGLang threw it out of the pool; the trace begins anew after the last time.
    selector
        The request's own.
    kept
        R of the request, in tokens.
    settings
        All settings of the server (:class:`kara_sglang.config.KaraConfig`).
    model, tokenizer
        Paths or hub names.
    tp_rank, tp_size
        Which tensor-parallel rank wrote the file.
    heads
        Numbers of the KV heads in ``bits``.
    num_kv_heads
        KV heads of the model, over all ranks.
    """

    rid: str
    finish: str
    retractions: int
    selector: str
    kept: int
    settings: dict[str, Any]
    model: str
    tokenizer: str
    tp_rank: int
    tp_size: int
    heads: list[int]
    num_kv_heads: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened to one request of which at least one window was compressed.

    Attributes
    ----------
    about : About
    prompt_ids, output_ids : np.ndarray
        Token ids, int64.
    windows : np.ndarray
        ``(num_windows, 5)``, int64, ascending: logical position of the first token, KV index of the
        first kept token, W, R, and whose queries chose as an index into ``state.VOTERS``.
    bits : np.ndarray
        ``(num_windows, num_layers, num_heads, ceil(W / 8))``, uint8: token j of a window is bit j % 8
        of byte j // 8, and 1 where the head keeps it.
    """

    about: About
    prompt_ids: np.ndarray
    output_ids: np.ndarray
    windows: np.ndarray
    bits: np.ndarray

    @property
    def width(self) -> int:
        """W in tokens, the same for all windows of a server."""
        return int(self.windows[0, 2])

    def keeps(self) -> np.ndarray:
        """``(num_windows, num_layers, num_heads, W)``, uint8, 1 where a head keeps a token."""
        return np.unpackbits(self.bits, axis=-1, count=self.width, bitorder="little")

    def mean(self) -> np.ndarray:
        """``(num_windows, W)``, float32: the share of all layers and heads that keeps a token."""
        return self.keeps().mean(axis=(1, 2), dtype=np.float32)


def folder_of(text: str) -> Path:
    """The folder that ``--kv-compress-trace`` names."""
    return Path(text).expanduser()


def prepare_folder(text: str) -> None:
    """Create the folder of the traces and try to write there.

    Raises
    ------
    ValueError
        One line that names the flag, where that cannot be done.
    """
    folder = folder_of(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as trial:
            Path(trial, "file").touch()
            os.link(Path(trial, "file"), Path(trial, "link"))  # as save() names its files
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--kv-compress-trace: cannot write to the folder {text!r} ({reason}); name another one"
        ) from None


def file_name(rid: str, tp_rank: int = 0, tp_size: int = 1) -> str:
    """The file of a request, safe on any file system: a rid is whatever the client sent.

    What was replaced or cut off may be all that tells two rids apart, and a rid may look like what has
    become of another, so a checksum that nobody can aim at is always behind it.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", rid)[:_LONGEST_NAME] or "_"
    checksum = hashlib.blake2b(rid.encode(errors="backslashreplace"), digest_size=8).hexdigest()
    rank = f".tp{tp_rank}" if tp_size > 1 else ""
    return f"{stem}-{checksum}{rank}.npz"


def save(trace: Trace, folder: Path) -> Path:
    """Write ``trace`` into ``folder``; a reader sees the whole file or none. No file is ever replaced:
    where a request with the same rid has left one, eight random characters tell them apart.

    Besides the arrays of :class:`Trace` the file holds ``mean`` for those who read it with numpy alone.

    Raises
    ------
    OSError
    """
    about = trace.about
    path = folder / file_name(about.rid, about.tp_rank, about.tp_size)
    header = {"format": FORMAT, "version": VERSION} | dataclasses.asdict(about)
    # A name that nobody can foresee, opened so that no link is followed.
    descriptor, unfinished = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as out:
            np.savez(
                out,
                about=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
                mean=trace.mean(),
                **{name: getattr(trace, name) for name in _ARRAYS},
            )
        try:
            os.link(unfinished, path)
        except FileExistsError:
            path = path.with_name(f"{secrets.token_hex(4)}-{path.name}")
            os.link(unfinished, path)
    finally:
        os.unlink(unfinished)
    return path


def load(path: Path) -> Trace:
    """Read what :func:`save` wrote.

    Raises
    ------
    TraceError
        Where the file cannot be read, is no trace, or contradicts itself.
    """
    try:
        with np.load(path) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise TraceError(f"{path}: not a trace of --kv-compress-trace")
            header = json.loads(bytes(file["about"]))
            if header.pop("format") != FORMAT:
                raise TraceError(f"{path}: not a trace of --kv-compress-trace")
            version = header.pop("version")
            if version != VERSION:
                raise TraceError(
                    f"{path}: a trace of version {version!r}; this kara-sglang reads {VERSION}"
                )
            trace = Trace(About(**header), *(file[name] for name in _ARRAYS))
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror or 'no numpy archive'})") from None
    except TraceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        raise TraceError(f"{path}: not a trace of --kv-compress-trace, or damaged") from None
    if problem := _contradiction(trace):
        raise TraceError(f"{path}: damaged: {problem}")
    return trace


def _contradiction(trace: Trace) -> str | None:
    """What in a file that could be read cannot be true, or None."""
    windows, bits = trace.windows, trace.bits
    length = len(trace.prompt_ids) + len(trace.output_ids)
    if any(ids.ndim != 1 or ids.dtype.kind not in "iu" for ids in (trace.prompt_ids, trace.output_ids)):
        return "the tokens are no list of numbers"
    if windows.ndim != 2 or windows.shape[1] != 5 or not windows.size or windows.dtype.kind not in "iu":
        return "the windows are no table of five columns"
    if not np.isin(windows[:, 4], range(len(VOTERS))).all():
        return "nobody knows who chose a window's tokens"
    heads = len(trace.about.heads)
    if bits.dtype != np.uint8 or bits.ndim != 4 or (len(bits), bits.shape[2]) != (len(windows), heads):
        return f"bit sets of shape {bits.shape} do not fit {len(windows)} windows and {heads} heads"
    starts, widths = windows[:, 0], windows[:, 2]
    if (widths != trace.width).any() or bits.shape[3] != -(-trace.width // 8):
        return "the bit sets are not as wide as the windows"
    if starts[0] < 0 or (starts[1:] < (starts + widths)[:-1]).any() or starts[-1] + widths[-1] > length:
        return "the windows overlap or reach behind the text"
    if (trace.keeps().sum(axis=-1, dtype=np.int64) != windows[:, 3, None, None]).any():
        return "a head keeps more or fewer tokens than its window says"
    return None


def merge(traces: Sequence[Trace]) -> Trace:
    """The traces of one request from several tensor-parallel ranks as one, with the heads of all.

    Raises
    ------
    TraceError
        Where they are not of one request.
    """
    first = traces[0]
    for other in traces[1:]:
        same = other.about.rid == first.about.rid and all(
            np.array_equal(getattr(other, name), getattr(first, name))
            for name in ("prompt_ids", "output_ids", "windows")
        )
        if not same or other.bits.shape[1] != first.bits.shape[1]:
            raise TraceError(
                f"traces of request {first.about.rid!r} and {other.about.rid!r} are not of one request "
                "as its tensor-parallel ranks saw it; show them one by one"
            )
    # A head that two ranks hold (more ranks than KV heads) is shown once.
    column = {head: (trace, i) for trace in traces for i, head in enumerate(trace.about.heads)}
    heads = sorted(column)
    bits = np.stack([column[head][0].bits[:, :, column[head][1]] for head in heads], axis=2)
    return dataclasses.replace(first, about=dataclasses.replace(first.about, heads=heads), bits=bits)

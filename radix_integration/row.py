"""What the plugin knows of one request: which part of its KV row is what.

A request's row of ``req_to_token``, in KV indices (*physical* positions), as half-open intervals::

    [0, protected)         owned by the prefix tree: never written, never freed by the pass
    [protected, start)     the request's own, uncompressed: the rest of the prompt, page alignment
    [start, base)          kept tokens of its windows so far, R each
    [base, base + W)       the next window; compressed when the row is ``due_at`` long
    [base + W, kv_len)     the newest tokens: never compressed before a whole window is behind them

*Logical* positions (RoPE's, the user's) run ahead of physical ones by ``removed``, a multiple of the
page size. Everything here is host arithmetic: exactly R of W tokens are kept, so no length ever
depends on a score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.schedule_batch import Req

    from kara_sglang.kernels.record import Recorder
    from kara_sglang.kernels.selectors import Selector

STATE = "kv_compress"
"""Attribute of SGLang's ``Req`` that holds its :class:`RequestState`; None for a request that is not
compressed, absent before its first decode step."""

Voters = Literal["none", "mean", "all"]
"""Whose recorded queries choose a window's tokens: nobody's, the means of GQA groups, or all heads'."""

VOTERS: tuple[Voters, ...] = get_args(Voters)
"""In the order of their numbers in files."""


def ceil_align(value: int, page_size: int) -> int:
    """The smallest multiple of ``page_size`` that is at least ``value``."""
    return -(-value // page_size) * page_size


@dataclass(frozen=True, slots=True)
class Geometry:
    """What all requests of a server share, in tokens."""

    page_size: int
    window: int
    delay: int


@dataclass(frozen=True, slots=True)
class Window:
    """One compressed window."""

    logical_start: int  # logical position of its first token
    kv_start: int  # KV index of its first kept token
    width: int  # W, tokens that it covered
    kept: int  # R, slots that it holds now
    mark: str = ""  # how its tokens were chosen, as far as settings leave it open

    @property
    def freed(self) -> int:
        return self.width - self.kept


@dataclass(frozen=True, slots=True)
class TracedWindow:
    """A window and its bit sets, which may still be on their way from the device.

    Attributes
    ----------
    bits
        As :attr:`kara_sglang.trace.format.Trace.bits` for one window, on the host.
    arrived
        Event behind the copy; None where there was nothing to wait for.
    """

    window: Window
    bits: torch.Tensor
    arrived: torch.cuda.Event | None


@dataclass(slots=True)
class RequestState:
    """One request's compression, from its first decode step to its end or retraction."""

    selector: Selector
    kept: int  # R for this request
    seed: int
    base: int  # KV index where the next window starts, page aligned
    generation: int = 0  # of the row, to notice a row that has a new owner
    removed: int = 0  # logical length - KV length
    windows: list[Window] = field(default_factory=list)  # those of its prefix come first
    reused: int = 0  # how many of them are its prefix's
    recorder: Recorder | None = None
    shares: bool = False  # its compressed row may enter the prefix tree
    insert_skipped: bool | None = None  # req.skip_radix_cache_insert before it was barred from the tree
    order: int = 0  # age: smaller came first
    in_vain: int = 0  # windows in a row that began without a recorder though it wanted one
    voted: int = 0  # windows that its present recorder's queries have chosen
    look_at: int = 0  # decode step of its date in the calendar; 0: none
    traced: list[TracedWindow] = field(default_factory=list)  # filled with --kv-compress-trace only

    def due_at(self, geometry: Geometry) -> int:
        """KV length from which on the next window can be compressed."""
        return self.base + geometry.window + geometry.delay

    def next_window(self, kv_len: int, geometry: Geometry) -> int:
        """Tokens to come before a window's first one; windows follow each other without a gap."""
        if kv_len < self.base:
            return self.base - kv_len
        return -(kv_len - self.base) % geometry.window

    def uncompressed(self, kv_len: int) -> int:
        """Tokens from the next window's start on."""
        return max(0, kv_len - self.base)

    def without_queries(self) -> int:
        """How many of its own windows had no queries, though its selector asks for them."""
        return sum(window.mark == "none" for window in self.windows[self.reused :])

    def commit(self, geometry: Geometry, mark: str = "") -> Window:
        """Account for the compression of the window at ``base``."""
        window = Window(self.base + self.removed, self.base, geometry.window, self.kept, mark)
        self.windows.append(window)
        self.removed += window.freed
        self.base += window.kept
        return window

    def check(self, geometry: Geometry, kv_len: int, protected: int) -> None:
        """Raise ``RuntimeError`` where an invariant does not hold for a window about to be taken."""
        page = geometry.page_size
        for name, value in (("base", self.base), ("W", geometry.window), ("R", self.kept)):
            if value % page:
                raise RuntimeError(f"kv-compress: {name} {value} is no multiple of page {page}")
        if not 0 < self.kept <= geometry.window:
            raise RuntimeError(f"kv-compress: R {self.kept} not in (0, {geometry.window}]")
        if self.base < protected:
            raise RuntimeError(
                f"kv-compress: window at {self.base} reaches into the {protected} tokens that the "
                "prefix tree owns"
            )
        if kv_len < self.due_at(geometry):
            raise RuntimeError(
                f"kv-compress: window at {self.base} taken at KV length {kv_len}, due at "
                f"{self.due_at(geometry)}"
            )
        if self.windows:
            last = self.windows[-1]
            if self.base < last.kv_start + last.kept:
                raise RuntimeError(f"kv-compress: window at {self.base} overlaps {last}")
            if len(self.windows) > self.reused and self.base > last.kv_start + last.kept:
                raise RuntimeError(f"kv-compress: window at {self.base} leaves a gap behind {last}")
        if self.removed != sum(window.freed for window in self.windows):
            raise RuntimeError(f"kv-compress: {self.removed} removed, windows say otherwise")


def state_of(req: Req) -> RequestState | None:
    """None for a request that is not compressed, or has not decoded yet."""
    state: RequestState | None = getattr(req, STATE, None)
    return state


def has_decoded(req: Req) -> bool:
    """Whether the request has taken its first decode step, since its last prefill."""
    return hasattr(req, STATE)


def keep_state(req: Req, state: RequestState | None) -> None:
    """Of a request that takes its first decode step; None: it is not compressed."""
    setattr(req, STATE, state)


def forget_state(req: Req) -> None:
    """The request is prefilled anew."""
    if hasattr(req, STATE):
        delattr(req, STATE)

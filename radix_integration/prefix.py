"""What a request has found in the prefix tree, and what its row holds because of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kara_sglang.radix_integration.layout import Layout
from kara_sglang.radix_integration.row import RequestState, Window, state_of

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.schedule_batch import Req

PREFIX = "kv_compress_prefix"
"""Attribute of SGLang's ``Req`` that holds its :class:`Prefix`, from its first match on."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a request shares compressed prefixes.

    Attributes
    ----------
    settings
        What decides which tokens of its windows are kept. Requests share where this is the same.
    least
        Tokens that a compressed prefix must reach farther than exact KV to be taken, at least 1.
    """

    settings: bytes
    least: int = 1


@dataclass(frozen=True, slots=True)
class Returned:
    """A row that a retraction took and that is back.

    Attributes
    ----------
    state
        As it was.
    row
        Its slots, int64; the prefix cache owns ``cache_protected_len`` of them.
    """

    state: RequestState
    row: torch.Tensor


@dataclass(slots=True)
class Prefix:
    """What one request has found."""

    sharing: Sharing | None  # None: it takes and leaves exact KV only
    windows: tuple[Window, ...] = ()  # in the prefix that it matched last
    found: tuple[Layout, int] | None = None  # of the key that it matched last; slots on the device
    reused_tokens: int = 0  # of its cached tokens: those from the first reused window on
    reused_slots: int = 0  # that hold them
    passed_over: int = 0  # tokens of a compressed prefix that gained too few to be taken
    computed_again: int = 0  # those that its first prefill computed
    waits: bool = False  # its own compressed row is on the host: it takes exact KV only
    returned: Returned | None = None  # until it decodes again


def prefix_of(req: Req) -> Prefix | None:
    """The request's part in compressed prefixes; None where it never looked for one."""
    return getattr(req, PREFIX, None)


def held_state(req: Req) -> RequestState | None:
    """The state of the request's row, also between its return and the next decode step."""
    state, prefix = state_of(req), prefix_of(req)
    if state is None and prefix is not None and prefix.returned is not None:
        return prefix.returned.state
    return state


def layout_of(req: Req) -> Layout:
    """The compressed windows in the request's row: matched ones, then its own."""
    state = state_of(req)
    if state is not None:
        return Layout.of(state.windows)
    prefix = prefix_of(req)
    return Layout(prefix.windows if prefix is not None else ())


def removed_of(req: Req) -> int:
    """Logical length minus KV length of the request's row."""
    state = state_of(req)
    return state.removed if state is not None else layout_of(req).removed


def forget_match(req: Req) -> None:
    """The request was retracted: its row is gone, and the next match decides anew."""
    prefix = prefix_of(req)
    if prefix is not None:
        prefix.windows, prefix.returned = (), None

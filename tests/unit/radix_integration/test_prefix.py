"""What a request has found in the tree, and what its row lacks because of it."""

from __future__ import annotations

from types import SimpleNamespace

from kara_sglang.radix_integration.layout import Layout
from kara_sglang.radix_integration.prefix import (
    PREFIX,
    Prefix,
    Sharing,
    forget_match,
    layout_of,
    prefix_of,
    removed_of,
)
from kara_sglang.radix_integration.row import Geometry, RequestState, Window, forget_state, keep_state

MATCHED = (Window(16, 16, 32, 8), Window(48, 24, 32, 16))


def test_a_row_is_what_its_match_says_until_it_decodes() -> None:
    """Then its state, which begins with the matched windows; a window that was kept whole is exact."""
    req = SimpleNamespace()
    assert prefix_of(req) is None and layout_of(req) == Layout() and removed_of(req) == 0
    setattr(req, PREFIX, Prefix(Sharing(b"half"), MATCHED))
    assert layout_of(req) == Layout(MATCHED) and removed_of(req) == 24 + 16
    state = RequestState(None, 32, 0, 96, removed=40, windows=list(MATCHED), reused=2)
    keep_state(req, state)
    state.commit(Geometry(16, 32, 0))
    assert len(state.windows) == 3 and layout_of(req) == Layout(MATCHED) and removed_of(req) == 40
    state.kept = 16
    state.commit(Geometry(16, 32, 0))
    assert removed_of(req) == layout_of(req).removed == 56
    forget_state(req)
    assert removed_of(req) == 40
    forget_match(req)
    assert layout_of(req) == Layout() and removed_of(req) == 0 and prefix_of(req).sharing is not None


def test_a_request_that_is_not_compressed_keeps_its_match() -> None:
    req = SimpleNamespace(**{PREFIX: Prefix(None, MATCHED)})
    keep_state(req, None)
    assert layout_of(req) == Layout(MATCHED)
    forget_match(SimpleNamespace())  # nobody ever looked

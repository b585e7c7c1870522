"""Asking SGLang's modules in a command whose output is a report."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep SGLang's start-up talk out of the report."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    talk = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(talk),
            contextlib.redirect_stderr(talk),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

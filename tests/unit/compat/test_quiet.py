"""SGLang's talk is kept out of a report."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from kara_sglang.compat.quiet import quiet


def test_nothing_is_said_inside_and_all_of_it_afterwards(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Prints, warnings and log lines; also where what is asked breaks off."""

    def talk() -> None:
        print("a print")
        print("an error", file=sys.stderr)
        logging.getLogger("sglang").critical("a line")
        warnings.warn("a warning", stacklevel=1)

    with pytest.raises(KeyError), quiet():
        talk()
        raise KeyError
    assert capfd.readouterr() == ("", "") and not caplog.records
    with pytest.warns(UserWarning, match="a warning"):
        talk()
    assert capfd.readouterr().out == "a print\n"
    assert [record.message for record in caplog.records] == ["a line"]


def test_what_was_disabled_before_stays_disabled(caplog: pytest.LogCaptureFixture) -> None:
    logging.disable(logging.WARNING)
    try:
        with quiet():
            pass
        assert logging.root.manager.disable == logging.WARNING
    finally:
        logging.disable(logging.NOTSET)

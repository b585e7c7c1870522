"""The versions of SGLang that the plugin was tested with, and what is said of others."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kara_sglang.config import KaraConfig

logger = logging.getLogger(__name__)

TESTED = ("0.5.22", "0.5.23")
"""Ascending. The engine tests pass on each of them (``make test-sglang VERSION=...``)."""

NEWEST = TESTED[-1]

SPECULATION = "0.5.23"
"""From there on with speculative decoding: before it NGRAM reads rows of ``req_to_token`` behind the
event that says that a step has read them (``speculative/spec_utils.py``,
``move_accept_tokens_to_target_kvcache``), when a pass may have written them."""

KEY = "untested_sglang"
"""Key of ``--kv-compress-config`` that lets a server start with a newer version."""


def of_version(config: KaraConfig) -> list[str]:
    """A refusal where the installed SGLang is not one of :data:`TESTED`; none where it is newer and the
    settings allow that. Whether hooks and attributes fit is checked beside it, in every case.
    """
    installed = version("sglang")
    if is_tested(installed) or (is_newer(installed) and config.untested_sglang):
        return []
    line = (
        f"SGLang {installed} is installed, --kv-compress was tested with {' and '.join(TESTED)}: "
        f"pip install sglang=={NEWEST}"
    )
    if is_newer(installed):
        line += (
            f"; or see what python -m kara_sglang.compat {installed} says, and start with "
            f"--kv-compress-config '{{\"{KEY}\": true}}'"
        )
    return [line]


def of_speculation(resolved: Any) -> list[str]:
    """A refusal where the installed SGLang is too old for the speculative decoding that its resolved
    settings ask for."""
    from packaging.version import Version

    installed = version("sglang")
    if resolved.speculative_algorithm is None or Version(installed) >= Version(SPECULATION):
        return []
    return [
        f"--speculative-algorithm does not work with --kv-compress on SGLang {installed}: "
        f"pip install sglang=={NEWEST}, or remove one of them"
    ]


def warn_if_untested() -> None:
    """Say in the log that the server runs with a version that nobody has tested."""
    installed = version("sglang")
    if not is_tested(installed):
        logger.warning(
            "kv-compress: SGLang %s was not tested with this plugin (%s were). All hooks and "
            "attributes are there, but what they do may have changed: check answers against a server "
            "without --kv-compress.",
            installed,
            " and ".join(TESTED),
        )


def is_tested(installed: str) -> bool:
    """Whether a version is one of :data:`TESTED`, whoever built it (``0.5.23+cu130``)."""
    return installed.partition("+")[0] in TESTED


def is_newer(installed: str) -> bool:
    """Whether a version lies behind the newest tested one."""
    from packaging.version import Version

    return Version(installed) > Version(NEWEST)

"""Per-request options for program authors, checked before they travel."""

from __future__ import annotations

from typing import Any

from kara_sglang.config import KaraConfig
from kara_sglang.options import KEY, RequestOptions


def custom_params(
    enabled: bool = True,
    *,
    selector: str | None = None,
    retain: float | None = None,
    seed: int | None = None,
    prefix: str | None = None,
) -> dict[str, Any]:
    """The ``custom_params`` of one request to a server that runs with ``--kv-compress``.

    For ``sampling_params["custom_params"]`` of ``/generate`` and ``sglang.Engine``, and for
    ``extra_body={"custom_params": ...}`` of the OpenAI client.

    Parameters
    ----------
    enabled : bool
        False leaves the request uncompressed; the other options say nothing then.
    selector : str, optional
        One of the server's selectors instead of its default.
    retain : float, optional
        Share of each window to keep, 0 < retain <= 1.
    seed : int, optional
        Of the ``random`` selector.
    prefix : str, optional
        ``exact``: reuse and leave uncompressed prefixes only. ``compressed`` says what a server with
        ``--kv-compress-prefix-reuse compressed`` does anyway; others refuse it.

    Raises
    ------
    ValueError
        As the server would with HTTP 400; the message names the field.
    """
    given = {"selector": selector, "retain": retain, "seed": seed, "prefix": prefix}
    options = {name: value for name, value in given.items() if value is not None}
    params: dict[str, Any] = {KEY: options or True} if enabled else {KEY: False}
    RequestOptions.parse(params, KaraConfig(prefix_reuse="compressed"))
    return params

"""Per-request options: ``custom_params = {"kv_compress": ...}`` of ``sampling_params``.

``false`` opts the request out; an object changes the share, the selector, the seed or the use of
compressed prefixes for this request alone. Checked in the launcher, where an error
becomes HTTP 400.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any, Literal

from kara_sglang.checks import checked, shown
from kara_sglang.config import KaraConfig, check_selector
from kara_sglang.kernels.selectors import REGISTRY

KEY = "kv_compress"


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What one request asked for; None: the server's setting."""

    enabled: bool = True
    selector: str | None = None
    retain: float | None = None
    seed: int | None = None
    prefix: Literal["exact", "compressed"] | None = None

    @classmethod
    def parse(cls, custom_params: Any, config: KaraConfig) -> RequestOptions:
        """Read and check a request's ``custom_params``.

        Raises
        ------
        ValueError
            One line that names the field.
        """
        if not isinstance(custom_params, dict) or custom_params.get(KEY) is None:
            return cls()
        value = custom_params[KEY]
        if isinstance(value, bool):
            return cls(enabled=value)
        if not isinstance(value, dict):
            raise ValueError(
                f"{KEY} must be true, false or an object with {_fields()}, got {shown(value)}"
            )
        fields: dict[str, Any] = {}
        for name, given in value.items():
            if name not in FIELDS:
                raise ValueError(f"{KEY}.{str(name)[:100]} is unknown; the fields are {_fields()}")
            if name == "selector":
                check_selector(f"{KEY}.selector", given)
            fields[name] = checked(f"{KEY}.{name}", given, FIELDS[name])
        retain = fields.get("retain")
        if retain is not None and not 0 < retain <= 1:
            raise ValueError(f"{KEY}.retain must be a share with 0 < retain <= 1, got {retain!r}")
        seed = fields.get("seed")
        if seed is not None and not 0 <= seed < 2**31:
            raise ValueError(f"{KEY}.seed must be between 0 and 2**31 - 1, got {seed!r}")
        selector = fields.get("selector")
        if selector is not None and REGISTRY[selector].needs_queries and not config.keeps_queries:
            raise ValueError(
                f"{KEY}.selector {selector!r} needs recorded queries, but this server keeps none "
                "(--kv-compress-query-mem-gb is 0); choose "
                + " or ".join(name for name, kind in REGISTRY.items() if not kind.needs_queries)
            )
        if fields.get("prefix") == "compressed" and not config.shares_prefixes:
            raise ValueError(
                f"{KEY}.prefix 'compressed' needs a server that shares compressed prefixes; start it "
                "with --kv-compress-prefix-reuse compressed or auto, or leave the field out"
            )
        return cls(**fields)


FIELDS: dict[str, Any] = {
    name: next(kind for kind in typing.get_args(union) if kind is not type(None))
    for name, union in typing.get_type_hints(RequestOptions).items()
    if name != "enabled"
}
"""Fields of a request's object, and their types."""


def _fields() -> str:
    return ", ".join(FIELDS)

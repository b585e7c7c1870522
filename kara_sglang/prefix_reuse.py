"""Which prefix reuse a server has whose settings leave it open.

Compressed prefixes are shared (``auto``) wherever that works. The launcher settles it once, when the
flags are known, and hands it to the schedulers with all other settings; whoever asks for compressed
prefixes by name gets a refusal instead (``launcher/refusals.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kara_sglang.compat.flags import Flags
from kara_sglang.config import KaraConfig

FLAGS: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("--disaggregation-mode decode", lambda c: c.disaggregation_mode == "decode"),
    # A decode server has none by itself.
    (
        "--disable-radix-cache",
        lambda c: c.disable_radix_cache and c.disaggregation_mode != "decode",
    ),
    # The trees of the others have keys of two tokens each.
    (
        "--speculative-algorithm (other than NGRAM)",
        lambda c: c.speculative_algorithm not in (None, "NGRAM"),
    ),
    # Nobody would see to it that prompts hold no ids of windows.
    ("--tokenizer-worker-num", lambda c: c.tokenizer_worker_num > 1),
    # The events would tell others about ids that are no tokens.
    ("--kv-events-config", lambda c: c.kv_events_config is not None),
)
"""What does not go with compressed prefixes: a flag, and whether the resolved settings use it."""


WINDOW_POOL = "a KV pool of sliding-window layers"
"""What of a model does not go with them: whether the pool still holds what they saw at a prefix's end
is said by the tree for keys without compressed windows."""


def obstacles(config: KaraConfig, resolved: Any, model: Any) -> list[str]:
    """What keeps a server from sharing compressed prefixes: flags, settings, what the model has.

    Parameters
    ----------
    config : KaraConfig
    resolved
        ``resolving_view(server_args)``.
    model
        SGLang's ``ModelConfig``.
    """
    flags = Flags(resolved)
    by_flags = [flag for flag, used in FLAGS if used(flags)]
    of_model = [WINDOW_POOL] if model.is_hybrid_swa else []
    return by_flags + config.not_shared(resolved.page_size) + of_model


def settled(config: KaraConfig, resolved: Any, model: Any) -> KaraConfig:
    """The same settings, where prefix reuse is left open with ``auto``, or ``exact`` for want of it."""
    if config.prefix_reuse is not None:
        return config
    works = not obstacles(config, resolved, model)
    return dataclasses.replace(config, prefix_reuse="auto" if works else "exact")


def in_words(config: KaraConfig, resolved: Any, model: Any) -> str:
    """What a server with settled settings reuses, and why no more, for people: a part of a sentence."""
    if config.shares_prefixes:
        farther = f"{config.least_gain:,} tokens farther" if config.least_gain > 1 else "farther"
        return (
            f"prefix reuse {config.prefix_reuse}: a compressed prefix is taken where it reaches "
            f"{farther} than exact KV"
        )
    against = " and ".join(obstacles(config, resolved, model))
    return "prefix reuse exact" + (
        f": compressed prefixes do not work with {against}" if against else ""
    )

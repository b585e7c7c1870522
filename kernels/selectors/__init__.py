"""The selectors that ``--kv-compress`` names. Adding one: a file and a line here, a row in the docs."""

from __future__ import annotations

from kara_sglang.kernels.selectors.base import Selector
from kara_sglang.kernels.selectors.causal import CausalSelector
from kara_sglang.kernels.selectors.identity import IdentitySelector
from kara_sglang.kernels.selectors.kara import KaraSelector
from kara_sglang.kernels.selectors.keys import KeysSelector
from kara_sglang.kernels.selectors.random import RandomSelector
from kara_sglang.kernels.selectors.recent import RecentSelector
from kara_sglang.kernels.selectors.settings import SelectorSettings
from kara_sglang.kernels.selectors.snapkv import SnapKVSelector

REGISTRY: dict[str, type[Selector]] = {
    selector.name: selector
    for selector in (
        KaraSelector,
        CausalSelector,
        SnapKVSelector,
        KeysSelector,
        RecentSelector,
        RandomSelector,
        IdentitySelector,
    )
}


def build(name: str, config: SelectorSettings) -> Selector:
    """The selector ``name`` with the settings that it takes from ``config``."""
    return REGISTRY[name].from_config(config)


__all__ = ["REGISTRY", "Selector", "build"]

"""kara_sglang: decode-time KV-cache compression for stock SGLang.

Installing the package is enough: SGLang finds the entry point ``sglang.srt.plugins`` by itself and
``python -m sglang.launch_server --kv-compress kara`` works. For ``sglang.Engine`` call
:func:`configure` before the engine is built.

The sub-packages ``kernels``, ``radix_integration``, ``frontend`` and ``benchmarks`` are links to
sibling folders in a checkout and folders in a wheel. They have no ``__init__.py`` at their top: a
regular package named ``kernels`` in the working directory would shadow the PyPI package ``kernels``
that SGLang and transformers import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "configure"]

if TYPE_CHECKING:
    from kara_sglang.config import KaraConfig


def configure(selector: str = "kara", **settings: Any) -> KaraConfig | None:
    """Switch compression on for every ``sglang.Engine`` built after this call in this process.

    Parameters
    ----------
    selector : str
        What ``--kv-compress`` takes: ``none``, ``kara``, ``causal``, ``snapkv``, ``keys``,
        ``recent``, ``random`` or ``identity``. ``none`` switches compression off again.
    **settings
        Fields of :class:`kara_sglang.config.KaraConfig`, e.g. ``window=512, retain=0.5``.

    Returns
    -------
    KaraConfig or None
        The settings that will be used; None with ``none``.

    Raises
    ------
    ValueError
        For an unknown field, a wrong type, a value out of range, or where SGLang would
        not load the plugin; nothing is changed then.
    """
    from kara_sglang import plugin
    from kara_sglang.config import NONE, KaraConfig

    config = None
    if selector == NONE:
        KaraConfig.from_settings(settings)  # checked all the same
    else:
        config = KaraConfig.from_settings({"selector": selector, **settings})
        if lines := plugin.not_loaded():
            raise ValueError("; ".join(lines))
    plugin.activate(config)
    return config

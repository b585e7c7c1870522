"""Which SGLang fits: versions, what the plugin uses of it, and where releases differ.

``versions.py``
    The versions that the plugin was tested with, and what is said of others.
``surface.py``
    The table of attributes, keywords and registries, beside the table of hooks (``hooks.py``).
``source.py``
    SGLang's source, installed or in a wheel, as syntax trees.
``report.py`` and ``python -m kara_sglang.compat``
    Both tables against a wheel that is not installed.
``kv_cache.py``
    In what type K and V are kept, before SGLang's pool is there to say so.
``attention_backends.py``
    Which of SGLang's attention backends a step uses.
``flags.py``
    A seam that is not the same in all tested versions, beside ``handshake.py`` and
    ``radix_integration/padding.py``. What SGLang has decides, not its number.
"""

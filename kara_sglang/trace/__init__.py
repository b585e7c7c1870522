"""``--kv-compress-trace DIR``: which tokens every window of a request kept, on file and as a page.

``format`` writes and reads one file per request, ``pair`` puts two of them side by side, ``viewer``
makes the HTML of ``python -m kara_sglang.trace show FILE``; ``scheduler/tracer.py`` collects. The
command needs neither torch nor SGLang, so nothing here imports them. The format: docs/trace.md.
"""

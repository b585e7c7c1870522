"""``--kv-compress-trace DIR``: which tokens every window of a request kept, on file and as a page.

``tracer`` collects in the scheduler, ``file`` writes and reads one file per request, ``pair`` puts two
of them side by side, ``page`` makes the HTML of ``python -m kara_sglang.trace show FILE``.
The format is described in docs/trace.md.
"""

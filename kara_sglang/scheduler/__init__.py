"""Runs in each scheduler process, which is one tensor-parallel rank: the pass and what it needs.

It imports ``radix_integration`` and ``kernels``, never ``launcher``. Decisions must be the same on all
ranks: nothing here asks a clock, draws a number without a seed, or waits for the device. It never ends
the process: an invariant that does not hold raises, and why a server must not start is told to the
launcher (``handshake.py``).
"""

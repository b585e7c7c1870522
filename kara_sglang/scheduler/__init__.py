"""Runs in each scheduler process, which is one tensor-parallel rank: the pass and what it needs.

It imports ``radix_integration``, ``kernels``, ``compat`` and the file format of ``trace``, and never
``launcher``. Decisions must be the same on all ranks: none asks a clock, draws a number without a seed,
or waits for the device. It never ends the process: an invariant that does not hold raises, and why a
server must not start is told to the launcher (``handshake.py``).
"""

"""Runs in the process that launches a server: flags, per-request options, what is refused by them.

It may raise ``ValueError`` for a request (HTTP 400), and ends the process with one line for a flag. It
never imports ``scheduler``, and touches no GPU; of ``radix_integration`` it takes what a token id is.
"""

"""What a machine without a GPU needs to run stock SGLang: everything of that kind, and only here.

SGLang pins CUDA packages of many gigabytes. None of them is needed on a CPU, but ``sgl_kernel`` is
imported all the same, torchvision's wheel cannot be imported without CUDA, and an fp8 KV cache is
refused on most CPUs.

``requirements.txt``, ``requirements-nodeps.txt``
    SGLang 0.5.23 and what it imports on a CPU; the second list is installed with ``--no-deps``.
``site/``
    A stand-in for ``sgl_kernel``, mends for torchvision's missing operators and for the KV cache, and
    plugins for SGLang with which speculative decoding runs (all that the launcher lets through; greedy
    only, as SGLang verifies on a CPU) and gpt-oss (unquantized). They are outside this package's own
    namespace because a ``.pth`` file, SGLang and torchvision look for them by their global names.
``install.py``
    Puts a copy of ``site/`` into the current virtual environment; no installed file is edited.

A GPU machine uses none of this.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

SWITCH = "SGLANG_USE_CPU_ENGINE"
"""SGLang's environment variable: on a CPU it can be imported with it only."""


def is_installed() -> bool:
    """Whether this environment runs SGLang on the CPU with the helpers of ``site/``."""
    return importlib.util.find_spec("kara_cpu_torchvision") is not None


@contextlib.contextmanager
def switch_put_back() -> Iterator[None]:
    """What is done inside may set :data:`SWITCH` for itself; behind it the variable is as before."""
    before = os.environ.get(SWITCH)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(SWITCH, None)

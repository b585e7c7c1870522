"""Loaded by every Python that has this folder on its path, SGLang's child processes included.

Two things keep stock SGLang 0.5.23 from starting with an image's older torch: environment variables
that benchmarks do not hand on, and an import of a Blackwell kernel that needs a package of 200 MB.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from enum import IntEnum
from typing import Any

# SGLang's compiled prefix tree reads tensors by the layout of torch 2.14; its Python twin does the
# same.
os.environ.setdefault("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", "python")
# SGLang asks for sglang-kernel 0.4.9; 0.4.5 is the last one that was built for torch 2.11.
os.environ.setdefault("SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK", "1")
os.environ.setdefault("SGLANG_JIT_CACHE_DIR", os.path.join(os.environ.get("KIT", "/tmp/kit"), "jit"))

_DUAL_GEMM = "sglang.kernels.ops.gemm.cutedsl_dual_gemm"


class _Mode(IntEnum):
    STATIC_PER_TENSOR = 0
    STATIC_PER_TOKEN = 1
    DYNAMIC_PER_TENSOR = 2
    DYNAMIC_PER_TOKEN = 3
    UNQUANT = 4


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for the module of the Blackwell kernel, where its own package is not there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _DUAL_GEMM or importlib.util.find_spec("cutlass") is not None:
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        module.DualGemmQuantMode = _Mode
        module.MAX_DUAL_GEMM_DECODE_TOKENS = 16
        # As the real one answers on every GPU before Blackwell.
        module.can_use_dual_gemm = lambda *_args, **_kwargs: False


sys.meta_path.insert(0, _Finder())

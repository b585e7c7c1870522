"""Lets SGLang keep K and V in fp8 on any CPU, editing no installed file.

SGLang wants Intel's AMX and its attention backend ``intel_amx`` for fp8_e4m3 on a CPU, and takes
fp8_e5m2 on none. Its backend ``torch_native`` needs neither: it reads either type as every other. The
modules below ask whether the platform is a CPU for this only (a test looks), so here they are told that
it is not, and build the pool that a GPU gets.

A ``.pth`` file imports this module at every start of the interpreter, so it imports nothing heavy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

MODULES = (
    "sglang.srt.mem_cache.kv_cache_configurator",
    "sglang.srt.mem_cache.kv_cache_dtype",
)


class NoCpu:
    """SGLang's ``current_platform``, but for one answer."""

    def __init__(self, platform: object) -> None:
        self._platform = platform

    def is_cpu(self) -> bool:
        return False

    def __getattr__(self, name: str) -> object:
        return getattr(self._platform, name)


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        module.current_platform = NoCpu(module.current_platform)  # type: ignore[attr-defined]


class Fp8OnAnyCpu(PathFinder):
    """Finds :data:`MODULES` where they are, and has another loader for them."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


sys.meta_path.insert(0, Fp8OnAnyCpu)

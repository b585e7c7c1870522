"""Modules of the CPU engine's ``site/``, from the checkout, whatever this environment has installed."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from kara_sglang.cpu_engine import install


def load(name: str) -> ModuleType:
    """Import a module or package of ``site/`` under a name that hides nothing."""
    package = install.SOURCE / name
    path = package / "__init__.py" if package.is_dir() else install.SOURCE / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"checkout_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # parts of a package look for it
    spec.loader.exec_module(module)
    return module

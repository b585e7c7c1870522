"""What figures were measured on, as every result says it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import psutil
import torch


def kind() -> str:
    """The GPU, or the cores that this process and the servers that it starts may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count()
    cores = f"{there}-core" if usable == there else f"{usable} of {there} cores of an"
    return f"{cores} {platform.machine()} CPU machine, no GPU"


def machine() -> dict[str, Any]:
    """Kind, memory and versions."""
    packages = ("sglang", "torch", "triton", "transformers", "kara-sglang")
    return {
        "kind": kind(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }

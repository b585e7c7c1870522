"""What figures were measured on, as every result says it."""

from __future__ import annotations

import os
import platform
import re
import shlex
from importlib import metadata
from typing import Any

import psutil
import torch

_FOLDER = re.compile(r"(?<![\w.:/~])/(?:[^\s/]+/)*(?=[^\s/])")
_ABOUT_FOLDERS = ("--dir", "--folder")


def kind() -> str:
    """The GPU, or the cores that this process and the servers that it starts may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count()
    cores = f"{there}-core" if usable == there else f"{usable} of {there} cores of an"
    return f"{cores} {platform.machine()} CPU machine, no GPU"


def origin(module: str, arguments: list[str]) -> dict[str, Any]:
    """The first entries of a result: the command that gave it, and the machine."""
    return {"command": command(module, arguments), "machine": machine()}


def heading(result: dict[str, Any]) -> str:
    """The same, above the tables of a result that begins with :func:`origin`."""
    return f"`{result['command']}` on a {result['machine']['kind']}\n\n"


def command(module: str, arguments: list[str]) -> str:
    """The command line that gives a result, without where its files lay on this machine."""
    words = ["python", "-m", module]
    rest = iter([word for given in arguments for word in _apart(given)])
    for word in rest:
        if word in _ABOUT_FOLDERS:
            next(rest, None)
        elif word == "--peer":
            name, _, _python = next(rest, "").partition("=")
            words += [word, f"{name}=PYTHON"]
        else:
            words.append(_FOLDER.sub("", word))
    return shlex.join(words)


def _apart(word: str) -> list[str]:
    """``--name=value`` as two words."""
    name, equals, value = word.partition("=")
    return [name, value] if equals and name.startswith("--") else [word]


def machine() -> dict[str, Any]:
    """Kind, memory and versions."""
    packages = ("sglang", "torch", "triton", "transformers", "kara-sglang")
    return {
        "kind": kind(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }

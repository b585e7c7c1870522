"""Command lines of the programs in this folder: how ``--help`` begins, and values that are checked."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

from kara_sglang import serve
from kara_sglang.config import KaraConfig

DTYPES = ("float32", "bfloat16", "float16")
OWN_MODELS = ("tiny", "smollm2")
"""Models that a program makes or finds by itself."""


def parser(spec: ModuleSpec | None, about: str | None) -> argparse.ArgumentParser:
    """A parser whose help says how the program is called and, as the module does, what it is for.

    Parameters
    ----------
    spec, about
        The module's ``__spec__`` and ``__doc__``. A file that is run by its path has no ``spec``.
    """
    # A package is run by its name, wherever in it options are read.
    name = spec and spec.name.removesuffix(".__main__").removesuffix(".command")
    called = f"python -m {name}" if name else None
    purpose = inspect.cleandoc(about or "").partition("\n\n")[0]
    return argparse.ArgumentParser(prog=called, description=purpose)


def whole(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """The type of a whole number within bounds."""
    bounds = f", {least} or more" if most is None else f" from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number{bounds}")
        return value

    return read


def positive(text: str) -> float:
    """The type of a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    """The type of the share of a window that is kept."""
    try:
        return KaraConfig(retain=float(text)).retain
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, 0 < share <= 1") from None


def model(text: str) -> str:
    """The type of a model: one of :data:`OWN_MODELS`, a folder, or a name on a hub."""
    try:
        return text if text in OWN_MODELS else serve.resolve_model(text)
    except serve.Refusal as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def model_folder(text: str) -> str:
    """The type of a model that must be on this machine."""
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a model's folder: it has no config.json")
    return text


def file(text: str) -> Path:
    """The type of a file that is read."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)

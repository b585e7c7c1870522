"""Lets torchvision's CUDA wheel be imported on a machine without a GPU, editing no installed file.

The wheel's compiled library cannot be loaded without CUDA. torchvision shrugs that off, yet its
module ``_meta_registrations`` goes on to describe the operators ``torchvision::nms`` and
``torchvision::qnms`` that only the library would have defined, and the import ends in ``operator
torchvision::nms does not exist``. SGLang imports torchvision for its image processors. The finder
below declares the two operators (their signature, no code) at the one moment that is right: when
that module is about to be imported and the compiled library has had its chance.

A ``.pth`` file imports this module at every start of the interpreter, so it imports nothing heavy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareTorchvisionOperators(MetaPathFinder):
    """Finds nothing itself; acts when ``torchvision._meta_registrations`` is looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        """Declare the operators that are missing, then leave the import to the usual finders."""
        if fullname != "torchvision._meta_registrations":
            return
        import torch

        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                torch.library.define(f"torchvision::{operator}", _SCHEMA)


sys.meta_path.insert(0, DeclareTorchvisionOperators())

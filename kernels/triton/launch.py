"""A launch that is made again and again with the same arguments.

``kernel[grid](...)`` looks at every argument each time to find out which compilation fits. Where all of
them stay (the same tensors, the same numbers) that is found out once: Triton returns what it has
compiled, and that can be launched by itself (as in Triton's own tutorial of the fused softmax).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime.jit import JITFunction


class Launch:
    """One launch with all its arguments; a call makes it on the current stream.

    Parameters
    ----------
    kernel : JITFunction
    programs : int
        Size of the grid.
    arguments
        By name, compiler options among them. Tensors are kept, as their addresses decide what fits.
    """

    __slots__ = ("_again", "arguments", "kernel", "programs")

    def __init__(self, kernel: JITFunction[Any], programs: int, **arguments: Any) -> None:
        self.kernel = kernel
        self.programs = programs
        self.arguments = arguments
        self._again: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self._again is not None:
            self._again()
            return
        compiled = self.kernel[(self.programs,)](**self.arguments)
        if compiled is None:  # Triton's interpreter compiles nothing
            return
        launch = compiled[(self.programs, 1, 1)]
        values = [self.arguments[parameter.name] for parameter in self.kernel.params]
        self._again = lambda: launch(*values)

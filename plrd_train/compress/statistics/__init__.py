"""What calibration text says about a Linear. One file a statistic, named as the statistic; adding a file adds it.

A method names the statistic that it needs. Each rank sums over its own part of the text; the sums of all ranks are then
added up on the rank that factors the Linear.
"""

from typing import Protocol

from torch import Tensor

from plrd_train.compress.ranks import Shape
from plrd_train.registry import Registry


class Statistic(Protocol):
    """What each file here defines, as functions of the module."""

    USES_GRADIENTS: bool
    """Whether `add` needs the gradient of the loss. Then the whole model must be in memory, and runs backward, one
    sequence at a time."""

    @staticmethod
    def size(shape: Shape) -> tuple[int, ...]:
        """The size of the float32 statistic of a Linear of that shape."""
        ...

    @staticmethod
    def add(total: Tensor, x: Tensor, grad: Tensor) -> int:
        """Add a part of the text to the sum `total`, in place, and return the number of terms that were added.

        `x` (tokens, in) are the inputs of the Linear and `grad` (tokens, out) the gradients of the loss with respect to
        its outputs, both float32. Without `USES_GRADIENTS`, `grad` is empty.
        """
        ...

    @staticmethod
    def mean(total: Tensor, count: int) -> Tensor:
        """The statistic, from the sum over the text of all ranks and its number of terms. It may overwrite `total`,
        which is often the largest tensor of the rank."""
        ...


STATISTICS = Registry("statistic", "compress.statistics", settings="Settings")

"""`energy`: one budget for all Linears, spent where a parameter saves the most, by the singular values alone.

The loss of a Linear at rank r is estimated as OF_ERROR-th power of its relative error, times the OF_SIZE-th power of
its dense parameters. The relative error is the root of the share of the energy (sum of the squared singular values)
that is cut off. Of the powers that were tried, these lose the least perplexity (docs/methods.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from plrd_train.compress.allocations._split import OF_ERROR, relative_errors, split
from plrd_train.compress.ranks import Shape

OF_SIZE = 0.25


@dataclass(frozen=True)
class Allocation:
    """Ranks are multiples of `multiple`."""

    spectra: ClassVar[bool] = True
    losses: ClassVar[bool] = False

    multiple: Annotated[int, Ge(1)]

    def ranks(
        self,
        shapes: Mapping[str, Shape],
        ratio: float,
        values: Mapping[str, Tensor],
        losses: Mapping[str, float] | None = None,
    ) -> dict[str, int]:
        lost = {
            name: relative_errors(values[name]) ** OF_ERROR * shape.dense_params**OF_SIZE
            for name, shape in shapes.items()
        }
        return split(shapes, ratio, self.multiple, lost)

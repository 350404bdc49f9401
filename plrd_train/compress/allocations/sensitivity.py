"""`sensitivity`: one budget for all Linears, spent where a parameter saves the most, by measured losses.

The loss of the model is measured with each Linear alone cut at one rank, its probe. At other ranks the increase of the
loss is estimated: like `energy`, as proportional to the OF_ERROR-th power of the Linear's relative error. Measuring at
more than one rank improved little (docs/log.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from plrd_train.compress.allocations._split import OF_ERROR, relative_errors, split
from plrd_train.compress.ranks import Shape

# Lower clamp on a measured loss increase, relative to the largest. A Linear whose cut does not raise the loss gets the
# lowest rank, and a share of the budget that no other Linear can use.
LEAST = 1e-6
# The share of its present parameters that a Linear keeps when it is measured.
SHARE = 0.4


@dataclass(frozen=True)
class Allocation:
    """Ranks are multiples of `multiple`; losses are measured on `tokens` of the training corpus."""

    spectra: ClassVar[bool] = True
    losses: ClassVar[bool] = True

    multiple: Annotated[int, Ge(1)]
    tokens: Annotated[int, Ge(1)]

    def probe(self, shape: Shape) -> int:
        """The largest rank that keeps `SHARE` of the Linear's present parameters, at least 1."""
        return max(shape.most_rank(SHARE * shape.params(shape.rank)), 1)

    def ranks(
        self, shapes: Mapping[str, Shape], ratio: float, values: Mapping[str, Tensor], losses: Mapping[str, float]
    ) -> dict[str, int]:
        least = LEAST * max(losses.values())
        lost = {}
        for name, increase in losses.items():
            errors = relative_errors(values[name]) ** OF_ERROR
            at_probe = errors[self.probe(shapes[name]) - 1].item()
            clamped = max(increase, least if least > 0 else 1.0)
            lost[name] = errors * (clamped / at_probe if at_probe > 0 else 0.0)
        return split(shapes, ratio, self.multiple, lost)

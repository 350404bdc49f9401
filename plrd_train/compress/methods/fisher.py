"""`fisher`: the best pair with errors weighted by how much the loss depends on the input channels (FWSVD, arXiv
2207.00112, section 3).

The paper weights the rows of W in y = x W, which are the columns of a Linear's weight.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from plrd_train.compress.algebra.metrics import by_channel
from plrd_train.compress.algebra.truncate import Spectral, of_dense, of_product, peak_bytes
from plrd_train.compress.ranks import Shape


@dataclass(frozen=True)
class Method:
    """The weight of an input channel is the root of its empirical Fisher information on `calibration_tokens` of the
    training corpus."""

    sequential: ClassVar[bool] = False
    statistic: ClassVar[str | None] = "gradients"

    calibration_tokens: int

    def dense(self, weight: Tensor, statistic: Tensor) -> Spectral:
        return of_dense(weight, right=by_channel(statistic.sqrt()))

    def product(self, up: Tensor, down: Tensor, statistic: Tensor) -> Spectral:
        return of_product(up, down, right=by_channel(statistic.sqrt()))

    def peak_bytes(self, shape: Shape) -> int:
        return peak_bytes(shape)

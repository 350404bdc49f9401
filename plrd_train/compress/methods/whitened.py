"""`whitened`: the pair whose outputs are nearest to the Linear's own on calibration text (the objective of SVD-LLM,
arXiv 2403.07378, section 3.2).

The paper takes the Cholesky factor of the inputs' second moment, which does not exist where that is singular, as on
less text than there are channels; here it is a root by eigendecomposition with clipped eigenvalues then, and for a
Linear with more inputs than outputs the moment itself serves. The optimum is the same.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from plrd_train.compress.algebra.metrics import whitened_peak_bytes, whitening
from plrd_train.compress.algebra.truncate import Spectral, of_dense, of_product
from plrd_train.compress.ranks import Shape


@dataclass(frozen=True)
class Method:
    """`calibration_tokens` of the training corpus tell the inputs; in each stage those of the model as it is then."""

    sequential: ClassVar[bool] = False
    statistic: ClassVar[str | None] = "inputs"

    calibration_tokens: int

    def dense(self, weight: Tensor, statistic: Tensor) -> Spectral:
        return of_dense(weight, right=whitening(statistic))

    def product(self, up: Tensor, down: Tensor, statistic: Tensor) -> Spectral:
        return of_product(up, down, right=whitening(statistic))

    def peak_bytes(self, shape: Shape) -> int:
        return whitened_peak_bytes(shape)

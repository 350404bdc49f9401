"""`whitened`: the pair whose outputs are nearest to those of the Linear on calibration text (the objective of SVD-LLM,
arXiv 2403.07378, section 3.2).

The paper takes the Cholesky factor of the inputs' second moment. It does not exist where the moment is singular, as on
fewer tokens than channels; then the root comes from an eigendecomposition with clipped eigenvalues. For a Linear with
more inputs than outputs no root is needed. The optimum is the same.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from plrd_train.compress.algebra.metrics import whitened_peak_bytes, whitening
from plrd_train.compress.algebra.truncate import Spectral, of_dense, of_product
from plrd_train.compress.ranks import Shape


@dataclass(frozen=True)
class Method:
    """The inputs are those on `calibration_tokens` of the training corpus, in each stage of the model at its start."""

    sequential: ClassVar[bool] = False
    statistic: ClassVar[str | None] = "inputs"

    calibration_tokens: int

    def dense(self, weight: Tensor, statistic: Tensor) -> Spectral:
        return of_dense(weight, right=whitening(statistic))

    def product(self, up: Tensor, down: Tensor, statistic: Tensor) -> Spectral:
        return of_product(up, down, right=whitening(statistic))

    def peak_bytes(self, shape: Shape) -> int:
        return whitened_peak_bytes(shape)

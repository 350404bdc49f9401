"""`svd`: truncated SVD of the weight, PLRD as published (arXiv 2406.19995, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from plrd_train.compress.algebra.truncate import Spectral, of_dense, of_product, peak_bytes
from plrd_train.compress.ranks import Shape


@dataclass(frozen=True)
class Method:
    """The best pair in the Frobenius norm of the weight; needs no data and has no settings."""

    sequential: ClassVar[bool] = False
    statistic: ClassVar[str | None] = None

    def dense(self, weight: Tensor, statistic: Tensor | None = None) -> Spectral:
        return of_dense(weight)

    def product(self, up: Tensor, down: Tensor, statistic: Tensor | None = None) -> Spectral:
        return of_product(up, down)

    def peak_bytes(self, shape: Shape) -> int:
        return peak_bytes(shape)

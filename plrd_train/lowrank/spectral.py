"""A weight decomposed once, from which the best pair of factors of any rank can be cut: of a dense W, and of a product A·B that is never formed.

"Best" is in the Frobenius norm of L (W - up down) R, where the metrics L on the output side and R on the input side say what an error costs (whitening,
activation or Fisher weights); without them it is the plain norm (Eckart and Young 1936). All cost what the smaller side costs.
"""

from typing import Protocol

import torch
from torch import Tensor

from plrd_train.lowrank.dense import Dense
from plrd_train.lowrank.factors import ABSOLUTE, RELATIVE, Factors, Metric
from plrd_train.lowrank.product import Product
from plrd_train.lowrank.ranks import Shape

__all__ = ["ABSOLUTE", "RELATIVE", "Factors", "Metric", "Spectral", "of_dense", "of_product", "peak_bytes"]


class Spectral(Protocol):
    """A weight decomposed in its metrics."""

    @property
    def values(self) -> Tensor:
        """(k,) float64 on the CPU, descending: the singular values of L W R; the sum of values[r:]**2 is the squared error of cutting at r."""
        ...

    def cut(self, rank: int) -> Factors:
        """The best pair of rank `rank`, on the device of the weight.

        Its error in the metrics is within 1 + RELATIVE of the optimum or below ABSOLUTE of ||L|| ||W|| ||R||. Raises ValueError where `rank` is not
        in 1..len(values).
        """
        ...

    def to(self, device: torch.device) -> "Spectral":
        """The same with its tensors on `device`."""
        ...


def of_dense(weight: Tensor, *, left: Metric | None = None, right: Metric | None = None) -> Spectral:
    """Decompose a dense `weight` (m, n), of any floating dtype, on its device, in the metrics `left` (m) and `right` (n).

    Raises ValueError where one of them holds NaN or Inf.
    """
    return Dense(weight, left, right)


def of_product(up: Tensor, down: Tensor, *, left: Metric | None = None, right: Metric | None = None) -> Spectral:
    """Decompose the product `up` (m, k) @ `down` (k, n) without forming it; otherwise as `of_dense`."""
    return Product(up, down, left, right)


def peak_bytes(shape: Shape, left: int = 0, right: int = 0) -> int:
    """What `of_dense` or `of_product` and `cut` take beyond their arguments, at most."""
    m, n = shape.out_features, shape.in_features
    small = min(m, n, shape.rank or min(m, n))
    return 4 * (4 * small * small + 3 * m * n) if shape.rank is None else 8 * (6 * small * small + 3 * small * (m + n))

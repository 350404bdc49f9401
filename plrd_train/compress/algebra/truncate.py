"""A weight is decomposed once, and the best pair of factors of any rank is cut from that: for a dense W, and for a
product A·B that is never formed.

"Best" means least in the Frobenius norm of L (W - up down) R. The metrics on the output side (L is the transpose of its
root) and on the input side (R is its root) are the cost of an error: whitening, activation or Fisher weights. Without
them it is the plain norm (Eckart and Young 1936). The cost is that of the smaller side.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from plrd_train.compress.algebra.dense import Dense
from plrd_train.compress.algebra.gram import ABSOLUTE, RELATIVE, Factors, Metric, Moment
from plrd_train.compress.algebra.product import Product

__all__ = [
    "ABSOLUTE",
    "RELATIVE",
    "Factors",
    "Metric",
    "Moment",
    "Size",
    "Spectral",
    "of_dense",
    "of_product",
    "peak_bytes",
]

# How a metric is given: by a full or a diagonal root, or by its moment; None: no metric.
Form = Literal["full", "diagonal", "moment", None]


class Size(Protocol):
    """The size of a weight: `out_features` x `in_features`, and its rank where it is a product (None: dense)."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def rank(self) -> int | None: ...


class Spectral(Protocol):
    """The decomposition of a weight in its metrics."""

    @property
    def values(self) -> Tensor:
        """(k,) float64 on the CPU, descending: the singular values of L W R; the sum of values[r:]**2 is the squared
        error of cutting at r."""
        ...

    def cut(self, rank: int) -> Factors:
        """The best pair of rank `rank`, on the device of the weight.

        Its error in the metrics is within 1 + RELATIVE of the optimum or below ABSOLUTE of ||L|| ||W|| ||R||. Raises
        ValueError where `rank` is not in 1..len(values).
        """
        ...

    def to(self, device: torch.device) -> "Spectral":
        """The same with its tensors on `device`."""
        ...


def of_dense(weight: Tensor, *, left: Metric | Moment | None = None, right: Metric | Moment | None = None) -> Spectral:
    """Decompose a dense `weight` (m, n), of any floating dtype, on its device, in the metrics `left` (m) and `right`
    (n).

    Raises ValueError where one of them holds NaN or Inf.
    """
    return Dense(weight, left, right)


def of_product(
    up: Tensor, down: Tensor, *, left: Metric | Moment | None = None, right: Metric | Moment | None = None
) -> Spectral:
    """Decompose the product `up` (m, k) @ `down` (k, n) without forming it; otherwise as `of_dense`."""
    return Product(up, down, left, right)


def peak_bytes(
    size: Size, rank: int | None = None, *, left: Form = None, right: Form = None, dtype: torch.dtype = torch.float32
) -> int:
    """The most that decomposing a weight of that size and cutting it at `rank` (None: the largest that makes it
    smaller) takes at once, in bytes: factors included, float32 weights and moments and metrics of other dtypes not.
    `left` and `right` are the forms of the metrics.

    `dtype` is that of the Gram matrices: float32, or float64 where the check at that rank asks for it. It holds for
    LAPACK with its workspace; also where the root of a moment takes its eigendecomposition, but where no root is needed
    it counts none.
    """
    m, n = size.out_features, size.in_features
    small, metrics = min(m, n), sum(form is not None for form in (left, right))
    rootless = size.rank is None and (left, right) == ((None, "moment") if m < n else ("moment", None))
    powers = {"full": 2, "diagonal": 1, "moment": 0 if rootless else 2, None: None}
    roots: int = sum(side**power for form, side in ((left, m), (right, n)) if (power := powers[form]))
    rooting = 0 if rootless else max(8 * side**2 if form == "moment" else 0 for form, side in ((left, m), (right, n)))
    rank = rank or size.rank or (m * n - 1) // (m + n)
    wide = dtype.itemsize // 4  # all is counted in float32
    if size.rank is None:
        near = (left if m < n else right) is not None  # a metric on the side of the eigenvectors
        balance = (22 if near else 15) * rank**2 if metrics else small * rank
        decompose = wide * max(4 * small**2, 0 if rootless else metrics * m * n + small**2)
        cut = wide * small**2 + rank * (m + n) + balance
    else:
        k = size.rank
        balance = (
            4 * k * rank + max(12 * k**2, 4 * k**2 + 17 * rank**2) if metrics else 2 * wide * k * rank + rank * (m + n)
        )
        decompose = wide * 8 * k**2
        cut = wide * 3 * k**2 + balance
    return 4 * max(rooting, roots + max(decompose, cut))

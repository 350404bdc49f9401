"""`svd`: truncated SVD of the weight, PLRD as published (arXiv 2406.19995, section 3)."""

from dataclasses import dataclass

from torch import Tensor

from plrd_train.lowrank.truncate import Factors, truncate, truncate_product


@dataclass(frozen=True)
class Factorizer:
    """The best pair in the Frobenius norm of the weight; needs no data and has no settings."""

    def dense(self, weight: Tensor, rank: int) -> Factors:
        return truncate(weight, rank)

    def product(self, up: Tensor, down: Tensor, rank: int) -> Factors:
        return truncate_product(up, down, rank)

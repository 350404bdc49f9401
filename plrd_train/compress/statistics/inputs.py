"""`inputs`: the second moment of the input, E[x x^T] over the tokens, (in, in)."""

from torch import Tensor

from plrd_train.compress.algebra.gram import symmetrized
from plrd_train.compress.ranks import Shape

USES_GRADIENTS = False


def size(shape: Shape) -> tuple[int, ...]:
    return shape.in_features, shape.in_features


def add(total: Tensor, x: Tensor, grad: Tensor) -> int:
    total.addmm_(x.T, x)
    return len(x)


def mean(total: Tensor, count: int) -> Tensor:
    return symmetrized(total.div_(count))  # a product of matrices is symmetric but for rounding

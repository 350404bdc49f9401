"""`magnitudes`: the mean magnitude of each input channel, E|x| over the tokens, (in,)."""

from torch import Tensor

from plrd_train.compress.ranks import Shape

USES_GRADIENTS = False


def size(shape: Shape) -> tuple[int, ...]:
    return (shape.in_features,)


def add(total: Tensor, x: Tensor, grad: Tensor) -> int:
    total += x.abs().sum(0)
    return len(x)


def mean(total: Tensor, count: int) -> Tensor:
    return total.div_(count)

"""`gradients`: the empirical Fisher information of each input channel, (in,): the mean over the sequences of the sum of
(d nll / d w)^2 over the channel's weights w.

The weight of a low-rank Linear is up @ down.
"""

from torch import Tensor

from plrd_train.compress.ranks import Shape

USES_GRADIENTS = True


def size(shape: Shape) -> tuple[int, ...]:
    return (shape.in_features,)


def add(total: Tensor, x: Tensor, grad: Tensor) -> int:
    total += (grad.T @ x).square_().sum(0)
    return 1  # one sequence


def mean(total: Tensor, count: int) -> Tensor:
    return total.div_(count)

"""`asvd`: the best pair with errors weighted by the magnitude of the input channels (ASVD, arXiv 2312.05821, section
3.2)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from plrd_train.compress.algebra.metrics import by_channel
from plrd_train.compress.algebra.truncate import Spectral, of_dense, of_product, peak_bytes
from plrd_train.compress.ranks import Shape


@dataclass(frozen=True)
class Method:
    """The weight of an input channel is its mean magnitude on `calibration_tokens` of the training corpus, to the power
    `alpha` (0.5 in the paper)."""

    sequential: ClassVar[bool] = False
    statistic: ClassVar[str | None] = "magnitudes"

    calibration_tokens: int
    alpha: float

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}: it must lie in 0..1")

    def dense(self, weight: Tensor, statistic: Tensor) -> Spectral:
        return of_dense(weight, right=by_channel(statistic**self.alpha))

    def product(self, up: Tensor, down: Tensor, statistic: Tensor) -> Spectral:
        return of_product(up, down, right=by_channel(statistic**self.alpha))

    def peak_bytes(self, shape: Shape) -> int:
        return peak_bytes(shape)

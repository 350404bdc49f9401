"""`rom`: the principal components of each Linear's outputs, in order (reduced order modelling, LLM-ROM, arXiv
2312.07046, section 2).

W ≈ V_r (V_r^T W), with the leading eigenvectors V_r of E[y y^T], y = W x, on calibration text. x is the input of the
Linear once the Linears before it are factored. That is the pair whose outputs are nearest to those of the Linear, and
it is computed as such from the second moment of x. The two factors are balanced; the paper leaves V_r orthonormal.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from plrd_train.compress.algebra.metrics import whitened_peak_bytes, whitening
from plrd_train.compress.algebra.truncate import Spectral, of_dense, of_product
from plrd_train.compress.contracts import BlockTask, FactorReport
from plrd_train.compress.ranks import Shape
from plrd_train.compress.steps import factor_by_statistic


@dataclass(frozen=True)
class Method:
    """The inputs are those on `calibration_tokens` of the training corpus."""

    sequential: ClassVar[bool] = True
    keeps_original: ClassVar[bool] = False
    trains_blocks: ClassVar[bool] = False
    statistic: ClassVar[str | None] = "inputs"

    calibration_tokens: int

    def dense(self, weight: Tensor, statistic: Tensor) -> Spectral:
        return of_dense(weight, right=whitening(statistic))

    def product(self, up: Tensor, down: Tensor, statistic: Tensor) -> Spectral:
        return of_product(up, down, right=whitening(statistic))

    def factor_block(self, task: BlockTask) -> dict[str, FactorReport]:
        return factor_by_statistic(task, self)

    def peak_bytes(self, shape: Shape) -> int:
        return whitened_peak_bytes(shape)

"""A pair of factors, the metrics in which it is the best one, and the small algebra of Gram matrices that finding it takes."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# The relative error of factors may exceed the optimum by this share of it; below ABSOLUTE of the norm it may be anything up to that, since factors
# stored in float32 are themselves off by about 1e-7.
RELATIVE = 5e-4
ABSOLUTE = 5e-6

# Squares of float32 neither overflow nor vanish while the largest entry lies between these.
_SAFE = (1e-8, 1e8)
# Rows of a tall matrix that are copied at a time, to another dtype or to be compared.
ROWS = 256
# The lower triangle of a Gram matrix is computed in that many strips: in so many as this, at 9/16 of the multiplications of the whole.
_STRIPS = 8


@dataclass(frozen=True)
class Factors:
    """W ≈ up @ down, balanced: up^T up = down down^T = diag(singular values of up @ down), since an unbalanced pair trains badly.

    `up` is (m, r), `down` (r, n), both float32; `rel_error` is ||W - up @ down||_F / ||W||_F (0 for W = 0), `metric_error` the same in the norm of
    the metrics, None without any.
    """

    up: Tensor
    down: Tensor
    rel_error: float
    metric_error: float | None = None


@dataclass(frozen=True)
class Metric:
    """What an error costs on one side of a weight: a column e of it costs ||root^T e||^2. `root` is (n, n), any square root of what is meant, as of a
    second moment root @ root^T its Cholesky factor; or the diagonal of such a matrix, (n,). Of any floating dtype.
    """

    root: Tensor = field(repr=False)

    def to(self, device: torch.device) -> "Metric":
        return Metric(self.root.to(device))


def times_root(metric: Metric | None, matrix: Tensor) -> Tensor:
    """root @ matrix, in the dtype and on the device of `matrix`; None is the identity."""
    return matrix if metric is None else _times(metric.root, matrix)


def seen_by(metric: Metric | None, matrix: Tensor) -> Tensor:
    """root^T @ matrix, whose squares are what `matrix` costs."""
    return matrix if metric is None else _times(metric.root.T if metric.root.ndim == 2 else metric.root, matrix)


def _times(form: Tensor, matrix: Tensor) -> Tensor:
    form = form.to(matrix)
    return form[:, None] * matrix if form.ndim == 1 else form @ matrix


def scaled(matrix: Tensor, name: str) -> tuple[Tensor, float]:
    """`matrix` in float32, or float64 where it is that, and a factor: their product is `matrix`, and squares of the former are safe.

    Raises ValueError, with `name`, where it holds NaN or Inf.
    """
    low, high = torch.aminmax(matrix)
    largest = max(-low.item(), high.item())
    if not math.isfinite(largest):  # NaN where there is one: aminmax hands it on
        raise ValueError(f"{name} holds NaN or Inf")
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    if largest == 0.0 or _SAFE[0] < largest < _SAFE[1]:
        return matrix, 1.0
    return matrix / largest, largest


def scaled_metric(metric: Metric | None, dtype: torch.dtype) -> tuple[Metric | None, float]:
    """Likewise of a metric, in `dtype`."""
    if metric is None:
        return None, 1.0
    root, scale = scaled(metric.root, "a metric")
    return Metric(root.to(dtype)), scale


def gram(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The lower triangle of matrix^T @ matrix in `dtype`, which is all that `eigh` and `cholesky` read; what lies above it is undefined."""
    n = matrix.shape[1]
    strip = max(-(-n // _STRIPS), 1)
    out = matrix.new_zeros(n, n, dtype=dtype)
    for part in (rows.to(dtype) for rows in matrix.split(ROWS if matrix.dtype != dtype else len(matrix))):
        for i in range(0, n, strip):
            out[i : i + strip, : i + strip].addmm_(part[:, i : i + strip].T, part[:, : i + strip])
    return out


def symmetric(lower: Tensor) -> Tensor:
    """The symmetric matrix of that lower triangle."""
    return lower.tril() + lower.tril(-1).T


def rounding(dtype: torch.dtype) -> float:
    """What a Gram matrix and its eigenvectors are off by, at most, as a share of its Frobenius norm: twice what spectra of all kinds show."""
    return 4 * torch.finfo(dtype).eps


def tail(squares: Tensor, rank: int) -> float:
    """The relative error of cutting at `rank`, by the squared singular values (k,), descending; 0 for those of zero."""
    total = squares.sum().item()
    return (max(squares[rank:].sum().item(), 0.0) / total) ** 0.5 if total > 0 else 0.0


def keeps(squares: Tensor, rank: int, off: float) -> bool:
    """Whether the leading `rank` eigenvectors of a Gram matrix that is off by `off` in the Frobenius norm keep enough; `squares` are its eigenvalues.

    P and P' project on the leading eigenvectors of G and of G + E. By Ky Fan's principle, applied to both, P' keeps at most
    tr((P' - P) E) <= ||P' - P||_F ||E||_F <= sqrt(2 min(r, k - r)) ||E||_F less of the energy than P.
    """
    excess, total = math.sqrt(2 * min(rank, len(squares) - rank)) * off, squares.sum().item()
    return total > 0 and excess <= total * max(2 * RELATIVE * tail(squares, rank) ** 2, (ABSOLUTE / 5) ** 2)


def floored(singular: Tensor) -> Tensor:
    """Singular values to balance by: one of zero would make its columns vanish in both factors, and with them both gradients."""
    largest = singular.max()
    return singular.clamp_min(torch.where(largest > 0, torch.finfo(torch.float32).eps * largest, 1.0))


def check_rank(rank: int, largest: int, what: str) -> None:
    if not 1 <= rank <= largest:
        raise ValueError(f"rank {rank} of {what}: it must lie in 1..{largest}")

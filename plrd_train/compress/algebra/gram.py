"""Factors, metrics, and the algebra of Gram matrices by which the best factors in a metric are found."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# The relative error of factors is within 1 + RELATIVE of the optimum, or below ABSOLUTE. Factors stored in float32 have
# relative errors of about 1e-7 of their own.
RELATIVE = 5e-4
ABSOLUTE = 5e-6

# Squares of float32 neither overflow nor vanish while the largest entry lies between these.
_SAFE = (1e-8, 1e8)
# Rows of a matrix that are copied to another dtype, or compared, at a time.
ROWS = 256
# Rows of a multiple of _PAGE bytes share cache lines of a CPU; _BORDER more columns avoid that.
_PAGE, _BORDER = 4096, 16
# The lower triangle of a Gram matrix is halved _HALVINGS times, and takes 9/16 of the multiplications of the whole
# matrix. Up to _SMALL rows the whole matrix is faster.
_HALVINGS, _SMALL = 3, 128


@dataclass(frozen=True)
class Factors:
    """W ≈ up @ down, balanced: up^T up = down down^T = diag(singular values of up @ down), since an unbalanced pair
    trains badly.

    `up` is (m, r), `down` (r, n), both float32; `rel_error` is ||W - up @ down||_F / ||W||_F (0 for W = 0),
    `metric_error` the same in the norm of the metrics, None without any.
    """

    up: Tensor
    down: Tensor
    rel_error: float
    metric_error: float | None = None


@dataclass(frozen=True)
class Metric:
    """The cost of an error on one side of a weight: a column e of the error costs ||root^T e||^2. `root` is (n, n), any
    square root of the matrix root @ root^T, such as the Cholesky factor of a second moment; or (n,), a diagonal. Any
    floating dtype.
    """

    root: Tensor = field(repr=False)

    def to(self, device: torch.device) -> "Metric":
        return Metric(self.root.to(device))


@dataclass(frozen=True)
class Moment:
    """A metric given by its square, a second moment: a column e of an error costs e^T (moment + floor I) e. `moment` is
    (n, n), symmetric, float32 or float64; only its lower triangle is read. `floor` is the lowest cost of a direction.

    A Gram matrix in this metric needs no root of the moment. A root takes O(n^3) operations and, in float64, several
    times the memory of the moment.
    """

    moment: Tensor = field(repr=False)
    floor: float

    def to(self, device: torch.device) -> "Moment":
        return Moment(self.moment.to(device), self.floor)

    def root(self) -> Metric:
        """The metric by its root, in float64, since the error of an eigenvalue in float32 exceeds the floor.

        It is the Cholesky factor where there is one, as that takes a twentieth of the time. Rounding may have made a
        singular moment indefinite; then the root is that of an eigendecomposition with clipped eigenvalues.
        """
        moment = self.moment.to(torch.float64, copy=True)
        moment.diagonal().add_(self.floor)
        lower, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            return Metric(lower)
        del lower  # the eigendecomposition works in twice its own size
        values, vectors = torch.linalg.eigh(moment)
        return Metric(vectors.mul_(values.clamp_min_(self.floor).sqrt_()))

    def gram(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """matrix^T @ (moment + floor I) @ matrix in `dtype`, of a `matrix` (n, k). It is off by `rounding(dtype)` of
        `terms(matrix)`."""
        out = matrix.new_zeros(matrix.shape[1], matrix.shape[1], dtype=dtype)
        for part, cost in self._parts(matrix, dtype):
            out.addmm_(part.T, cost)
        return (out + out.T).div_(2)

    def cost(self, matrix: Tensor) -> float:
        """The trace of the Gram matrix: the cost of all columns together. It is summed in float64, as its terms cancel
        where the columns lie in directions of low cost."""
        return math.fsum((part * cost).sum().item() for part, cost in self._parts(matrix, torch.float64))

    def terms(self, matrix: Tensor) -> float:
        """Twice the root of the sum of the squares of all terms moment[i, j] * matrix[i, k] * matrix[j, l] of all
        entries of `gram(matrix)`, of which those below the diagonal are taken twice.

        It bounds the rounding error where these terms cancel. It is twice the norm of the moment, scaled by the norms
        of the rows of `matrix`.
        """
        norms = torch.linalg.vector_norm(matrix, dim=1).double()
        parts = zip(self.moment.split(ROWS // 4), norms.split(ROWS // 4), strict=True)
        squares = ((rows * own[:, None]).mul_(norms).square_().sum().item() for rows, own in parts)
        return 2 * math.sqrt(math.fsum(squares))

    def _parts(self, matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows a of `matrix`, and as many rows b, strip by strip: the symmetric part of the sum of a^T b is the Gram
        matrix. Entries of the moment below the diagonal count twice, and those above it not at all."""
        for start in range(0, len(matrix), ROWS):
            part, rows = matrix[start : start + ROWS].to(dtype), self.moment[start : start + ROWS]
            own = symmetric(rows[:, start : start + ROWS].to(dtype))
            own.diagonal().add_(self.floor)
            cost = own @ part
            for block, others in zip(rows[:, :start].split(ROWS, dim=1), matrix[:start].split(ROWS), strict=True):
                cost.addmm_(block.to(dtype), others.to(dtype), alpha=2)
            yield part, cost


def rooted(metric: Metric | Moment | None) -> Metric | None:
    return metric.root() if isinstance(metric, Moment) else metric


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
    """`matrix` in float32, or float64 where it is that, and a factor: their product is `matrix`, and squares of the
    former are safe. No gradient follows it.

    Raises ValueError, with `name`, where it holds NaN or Inf.
    """
    matrix = matrix.detach()
    size = largest(matrix)
    if not math.isfinite(size):
        raise ValueError(f"{name} holds NaN or Inf")
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    if size == 0.0 or _SAFE[0] < size < _SAFE[1]:
        return matrix, 1.0
    return matrix / size, size


def largest(matrix: Tensor) -> float:
    """The largest magnitude of its entries; NaN where there is one."""
    low, high = torch.aminmax(matrix)
    return max(-low.item(), high.item())


def scaled_metric(metric: Metric | None, dtype: torch.dtype) -> tuple[Metric | None, float]:
    """As `scaled`, for the root of a metric, in `dtype`."""
    if metric is None:
        return None, 1.0
    root, scale = scaled(metric.root, "a metric")
    return Metric(root.to(dtype)), scale


def scaled_moment(metric: Moment) -> tuple[Moment, float]:
    """As `scaled`, for a moment; the factor is that of its root."""
    moment, scale = scaled(metric.moment, "a metric")
    return Moment(moment, metric.floor / scale), scale**0.5


def gram(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The lower triangle of matrix^T @ matrix in `dtype`, which is all that `eigh` and `cholesky` read; the entries
    above it are undefined."""
    out = matrix.new_zeros(matrix.shape[1], matrix.shape[1], dtype=dtype)
    for part in matrix.split(ROWS if matrix.dtype != dtype else len(matrix)):
        _add_gram(out, part.to(dtype), _HALVINGS)
    return out


def _add_gram(out: Tensor, part: Tensor, halvings: int) -> None:
    """Add the lower triangle of part^T @ part to that of `out`."""
    n = len(out)
    if not halvings or n <= _SMALL:
        out.addmm_(part.T, part)
        return
    half = n // 2
    left, right = part[:, :half], part[:, half:]
    _add_gram(out[:half, :half], left, halvings - 1)
    _add_gram(out[half:, half:], right, halvings - 1)
    out[half:, :half].addmm_(right.T, left)


def bordered(lower: Tensor) -> Tensor:
    """The lower triangle of a symmetric matrix (n, n), with a border where its rows would share cache lines: LAPACK
    takes a tenth to a quarter longer for n = 1024 or 2048 than for 16 more. The eigenvalues of the border are by far
    the lowest, and its eigenvectors are 0 in all other rows."""
    n = len(lower)
    if lower.device.type != "cpu" or n * lower.itemsize % _PAGE:
        return lower
    wide = lower.new_zeros(n + _BORDER, n + _BORDER)
    wide[:n, :n] = lower
    wide.diagonal()[n:] = -(2 * torch.linalg.vector_norm(lower) or 1.0)
    return wide


def symmetric(lower: Tensor) -> Tensor:
    """The symmetric matrix of that lower triangle."""
    return lower.tril() + lower.tril(-1).T


def symmetrized(matrix: Tensor) -> Tensor:
    """`matrix` (n, n), overwritten by the mean of it and its transpose."""
    for start in range(0, len(matrix), ROWS):
        end = start + ROWS
        own, right, below = matrix[start:end, start:end], matrix[start:end, end:], matrix[end:, start:end]
        own.copy_((own + own.T) / 2)
        right.add_(below.T).div_(2)
        below.copy_(right.T)
    return matrix


def rounding(dtype: torch.dtype) -> float:
    """A bound on the error of a Gram matrix and its eigenvectors, relative to its Frobenius norm: twice the largest
    error that was observed over spectra of all kinds."""
    return 4 * torch.finfo(dtype).eps


def tail(squares: Tensor, rank: int) -> float:
    """The relative error of cutting at `rank`, by the squared singular values (k,), descending; 0 for those of zero."""
    total = squares.sum().item()
    return (max(squares[rank:].sum().item(), 0.0) / total) ** 0.5 if total > 0 else 0.0


def keeps(squares: Tensor, rank: int, off: float) -> bool:
    """Whether the leading `rank` eigenvectors of a Gram matrix with an error of `off` in the Frobenius norm are
    accurate enough; `squares` are its eigenvalues.

    P and P' project on the leading eigenvectors of G and of G + E. By Ky Fan's principle, applied to both, P' keeps at
    most tr((P' - P) E) <= ||P' - P||_F ||E||_F <= sqrt(2 min(r, k - r)) ||E||_F less of the energy than P.
    """
    excess, total = math.sqrt(2 * min(rank, len(squares) - rank)) * off, squares.sum().item()
    return total > 0 and excess <= total * max(2 * RELATIVE * tail(squares, rank) ** 2, (ABSOLUTE / 5) ** 2)


def floored(singular: Tensor) -> Tensor:
    """Singular values to balance by, clamped from below: at zero the columns of both factors would vanish, and so would
    both gradients."""
    largest = singular.max()
    return singular.clamp_min(torch.where(largest > 0, torch.finfo(torch.float32).eps * largest, 1.0))


def check_rank(rank: int, largest: int, what: str) -> None:
    if not 1 <= rank <= largest:
        raise ValueError(f"rank {rank} of {what}: it must lie in 1..{largest}")

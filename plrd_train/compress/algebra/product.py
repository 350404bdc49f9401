"""The product up @ down, decomposed without being formed: all but two tall products are of k x k matrices.

With the Gram matrices G = (L up)^T (L up) and F = (down R) (down R)^T = C C^T (Cholesky), the eigenvalues of C^T G C
are the squared singular values of L up down R, and with its leading eigenvectors V the best pair is (up C V) (V^T C^-1
down): the square-root method of balanced truncation (Laub, Heath, Paige and Ward 1987) in the form of a projection. At
each rank a bound on the rounding error is checked. Where it does not hold in float32, the decomposition is repeated in
float64, and at last by Householder QR of both factors and the SVD of the core.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plrd_train.compress.algebra.gram import (
    ABSOLUTE,
    RELATIVE,
    Factors,
    Metric,
    Moment,
    check_rank,
    floored,
    gram,
    keeps,
    rooted,
    rounding,
    scaled,
    scaled_metric,
    seen_by,
    symmetric,
    tail,
)


class Product:
    """`plrd_train.compress.algebra.truncate.Spectral` of up (m, k) @ down (k, n)."""

    def __init__(self, up: Tensor, down: Tensor, left: Metric | Moment | None, right: Metric | Moment | None):
        (self._up, scale_up), (self._down, scale_down) = scaled(up, "up"), scaled(down, "down")
        self._scale = scale_up * scale_down
        dtype = torch.promote_types(self._up.dtype, self._down.dtype)
        (self._left, scale_left), (self._right, scale_right) = (
            scaled_metric(rooted(metric), dtype) for metric in (left, right)
        )
        self._measure = self._scale * scale_left * scale_right
        self._core = self._decompose(dtype)

    @property
    def values(self) -> Tensor:
        count = min(len(self._up), *self._down.shape)
        return self._core.squares[:count].double().clamp_min(0).sqrt().cpu() * self._measure

    def cut(self, rank: int) -> Factors:
        m, (k, n) = len(self._up), self._down.shape
        check_rank(rank, min(m, k, n), f"a product of {m} x {k} and {k} x {n}")
        while not self._core.holds(rank):
            self._core = self._decompose(torch.float64) if self._core.squares.dtype == torch.float32 else self._by_qr()
        into, out = self._core.pair(rank)
        error, metric_error, sound = tail(self._core.squares, rank), None, isinstance(self._core, _ByGram)
        if self._left is not None or self._right is not None:
            into, out = into.double(), out.double()
            up, down = symmetric(gram(self._up, torch.float64)), symmetric(gram(self._down.T, torch.float64))
            error, metric_error = _error(up, down, into @ out), error
            change = balancing(into.T @ up @ into, out @ down @ out.T)
            sound = change is not None
            if change is not None:
                into, out = (into @ change[0]).to(self._core.squares), (change[1] @ out).to(self._core.squares)
        if sound:
            pair = self._up.to(into) @ into, out @ self._down.to(out)
        else:
            pair = balanced(self._up.double() @ into.double(), out.double() @ self._down.double())
        return scaled_pair(*pair, self._scale, error, metric_error)

    def to(self, device: torch.device) -> "Product":
        moved = copy.copy(self)
        moved._up, moved._down, moved._core = self._up.to(device), self._down.to(device), _moved(self._core, device)
        moved._left, moved._right = (metric and metric.to(device) for metric in (self._left, self._right))
        return moved

    def _decompose(self, dtype: torch.dtype) -> "_ByGram | _ByQR":
        """In `dtype`, or more exactly where that fails."""
        up = gram(seen_by(self._left, self._up.to(dtype)), dtype)
        down = gram(seen_by(self._right, self._down.T.to(dtype)), dtype)
        core = _by_gram(up, down)
        if core is None:
            return self._decompose(torch.float64) if dtype == torch.float32 else self._by_qr()
        return core

    def _by_qr(self) -> "_ByQR":
        return _ByQR.of(seen_by(self._left, self._up.double()), seen_by(self._right, self._down.T.double()))


def _moved(core: Any, device: torch.device) -> Any:
    """A dataclass with its tensors on `device`."""
    return dataclasses.replace(
        core, **{name: value.to(device) for name, value in vars(core).items() if isinstance(value, Tensor)}
    )


def scaled_pair(up: Tensor, down: Tensor, scale: float, error: float, metric_error: float | None) -> Factors:
    """The factors of scale * up @ down."""
    if scale != 1.0:
        up, down = up * scale**0.5, down * scale**0.5
    return Factors(up.float().contiguous(), down.float().contiguous(), error, metric_error)


def balancing(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor] | None:
    """The matrices a and b = a^-1 for which (up a) (b down) is balanced, from the Gram matrices up^T up and down
    down^T, (r, r), in float64. None where these are too ill-conditioned."""
    core = _by_gram(up, down)
    return core.pair(len(up)) if core is not None and core.skew <= ABSOLUTE / 5 else None


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced pair of the product `up` (m, r) @ `down` (r, n), both in float64, however ill-conditioned."""
    core = _ByQR.of(up, down.T)
    root = floored(core.s).sqrt()
    return core.q_up @ (core.u * (core.s / root)), (core.q_down @ (core.v * root)).T


def rebalanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced pair, in the dtype of the pair where its condition allows that."""
    change = balancing(gram(up, torch.float64), gram(down.T, torch.float64))
    if change is None:
        return balanced(up.double(), down.double())
    return up @ change[0].to(up), change[1].to(down) @ down


def _error(up: Tensor, down: Tensor, cut: Tensor) -> float:
    """||up (I - cut) down||_F / ||up down||_F, by the Gram matrices of up and down."""
    rest = torch.eye(len(cut), dtype=cut.dtype, device=cut.device) - cut
    lost, whole = (rest.T @ up @ rest * down).sum().item(), (up * down).sum().item()
    return (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


@dataclass(frozen=True)
class _ByGram:
    """A truncation of a product, by Gram matrices."""

    squares: Tensor  # (k,) of the singular values, descending
    vectors: Tensor
    lower: Tensor
    inverse: Tensor
    skew: float  # bound on the deviation of the rows of inverse @ down from orthonormal
    off: float  # bound on the error of `squares`

    def holds(self, rank: int) -> bool:
        """Whether the cut at that rank is within RELATIVE or ABSOLUTE of the optimum."""
        return self.skew <= max(RELATIVE / 4 * tail(self.squares, rank), ABSOLUTE / 5) and keeps(
            self.squares, rank, self.off
        )

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """The matrices for which (up @ into) @ (out @ down) is the best pair of that rank, balanced in the metrics."""
        root = floored(self.squares[:rank].clamp_min(0).sqrt()).sqrt()
        leading = self.vectors[:, :rank]
        return self.lower @ (leading / root), (leading * root).T @ self.inverse


def _by_gram(up: Tensor, down: Tensor) -> _ByGram | None:
    """The truncation of a pair with the Gram matrices up^T up and down down^T, given by their lower triangles. None
    where the latter is singular to rounding."""
    lower, failed = torch.linalg.cholesky_ex(down)
    if failed:
        return None
    inverse = torch.linalg.solve_triangular(
        lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
    )
    # Rounding in a Gram matrix is relative to the norms of the columns: ill-conditioning is what remains once these are
    # one.
    grows = rounding(down.dtype) * _square_norm(inverse * down.diagonal().sqrt())
    squares, vectors = torch.linalg.eigh(lower.T @ symmetric(up) @ lower)
    size = max(squares.norm().item(), (up.diagonal() * down.diagonal()).norm().item())
    return _ByGram(squares.flip(0), vectors.flip(1), lower, inverse, skew=grows * len(down) ** 0.5, off=grows * size)


def _square_norm(matrix: Tensor) -> float:
    """The square of the 2-norm, to some tenths, by power iteration."""
    vector = torch.linalg.vector_norm(matrix, dim=0)
    for _ in range(10):
        vector = matrix.T @ (matrix @ (vector / vector.norm()))
    square: float = vector.norm().item()
    return square


@dataclass(frozen=True)
class _ByQR:
    """A truncation by Householder QR, in float64: of a pair however ill-conditioned."""

    q_up: Tensor
    r_up: Tensor
    q_down: Tensor
    r_down: Tensor
    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def of(cls, up: Tensor, down: Tensor) -> "_ByQR":
        """Of `up` (m, k) and the transpose (n, k) of `down`."""
        q_up, r_up = torch.linalg.qr(up)
        q_down, r_down = torch.linalg.qr(down)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        return cls(q_up, r_up, q_down, r_down, u, s, vh.T)

    @property
    def squares(self) -> Tensor:
        return self.s.square()

    def holds(self, rank: int) -> bool:
        return True

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """As `_ByGram.pair`, but not balanced: a singular value of zero gives zeros in both matrices."""
        s = self.s[:rank]
        sound = s > torch.finfo(s.dtype).eps * len(self.s) * s[0]
        return self.r_down.T @ (self.v[:, :rank] * torch.where(sound, 1 / s, 0.0)), self.u[:, :rank].T @ self.r_up

"""A dense W (m x n), decomposed by the Gram matrix of its smaller side, n.

Let V be the leading eigenvectors of (L W R)^T (L W R). Without a metric R on the side of the eigenvectors, W ≈ (W V)
V^T. With R, W ≈ U B^+ L W, where U = W R V and B = L U. That needs no inverse of R; in R's null space the result stays
as close to W as possible. Both are projections. So their error is that of the subspace alone, and they are exact at
full rank, whatever the accuracy of the eigenvalues. At each rank a bound on what the subspace may have lost is checked.
Where it does not hold, or the eigensolver does not converge, the Gram matrix is formed in float64, and at last L W R
itself is decomposed.

Where there is no R, a metric L may be given by its moment L^T L, from which the Gram matrix and the errors follow. Its
root is formed only to decompose L W, or where the Gram matrix shows that the moment is indefinite; the root has clipped
eigenvalues. Negative eigenvalues that rounding leaves in the moment, and the Gram matrix does not show, change the
square of an error by at most themselves times the square of the error in their directions.
"""

import copy

import torch
from torch import Tensor

from plrd_train.compress.algebra.gram import (
    ROWS,
    Factors,
    Metric,
    Moment,
    bordered,
    check_rank,
    floored,
    gram,
    keeps,
    rooted,
    rounding,
    scaled,
    scaled_metric,
    scaled_moment,
    seen_by,
    symmetric,
    tail,
    times_root,
)
from plrd_train.compress.algebra.product import balanced, balancing, rebalanced, scaled_pair

# Above this relative error, the eigenvalues give its square to about 1e-4 of itself; below, it is measured.
_KNOWN = 0.1
# Rows of the output buffer have a multiple of this length: CPU libraries take a quarter longer for 333 columns than for
# 336.
_ALIGNED = 16


class Dense:
    """`plrd_train.compress.algebra.truncate.Spectral` of a dense weight (m, n)."""

    def __init__(self, weight: Tensor, left: Metric | Moment | None, right: Metric | Moment | None):
        self._weight, self._scale = scaled(weight, "weight")
        self._wide = weight.shape[0] < weight.shape[1]
        if self._wide:  # from here on the right side is the smaller
            self._weight, left, right = self._weight.T, right, left
        dtype = self._weight.dtype
        self._left: Metric | None = None
        self._moment: Moment | None = None  # in the place of the left metric
        if isinstance(left, Moment) and right is None:
            self._moment, scale_left = scaled_moment(left)
        else:
            self._left, scale_left = scaled_metric(rooted(left), dtype)
        self._right, scale_right = scaled_metric(rooted(right), dtype)
        self._measure = self._scale * scale_left * scale_right
        self._decompose(dtype)

    @property
    def values(self) -> Tensor:
        values: Tensor = self._squares.double().clamp_min(0).sqrt().cpu() * self._measure
        return values

    def cut(self, rank: int) -> Factors:
        m, n = self._weight.shape
        check_rank(rank, n, f"a {n} x {m} matrix" if self._wide else f"a {m} x {n} matrix")
        if not keeps(self._squares, rank, self._off) and self._squares.dtype == torch.float32:
            self._decompose(torch.float64)
        if not keeps(self._squares, rank, self._off):
            self._decompose_exactly()
        basis = self._vectors[:, :rank].to(self._weight.dtype)
        error, metric_error = tail(self._squares, rank), None
        if self._left is None and self._right is None and self._moment is None:
            up = self._onto(basis)
            root = floored(torch.linalg.vector_norm(up, dim=0)).sqrt()
            up, down = up.div_(root), (basis * root).T
            if error < _KNOWN:
                error = self._error(up, down)
        else:
            up, down = self._project(basis)
            metric_error = error if error > _KNOWN else self._metric_error(up, down)
            error = self._error(up, down)
        if self._wide:
            up, down = down.T, up.T
        return scaled_pair(up, down, self._scale, error, metric_error)

    def to(self, device: torch.device) -> "Dense":
        moved = copy.copy(self)
        moved._weight, moved._squares, moved._vectors = (
            tensor.to(device) for tensor in (self._weight, self._squares, self._vectors)
        )
        moved._left, moved._right = (metric and metric.to(device) for metric in (self._left, self._right))
        moved._moment = self._moment and self._moment.to(device)
        return moved

    def _onto(self, basis: Tensor) -> Tensor:
        """W @ basis, in the memory layout of its transpose where `cut` returns that."""
        weight, rank = self._weight.to(basis.dtype), basis.shape[1]
        if self._wide:
            return (basis.T @ weight.T).T
        if weight.device.type != "cpu":
            return weight @ basis
        up = weight.new_empty(len(weight), rank)
        aligned = weight.new_empty(ROWS, -(-rank // _ALIGNED) * _ALIGNED)[:, :rank]
        for rows, part in zip(weight.split(ROWS), up.split(ROWS), strict=True):
            part.copy_(torch.mm(rows, basis, out=aligned[: len(rows)]))
        return up

    def _project(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """The balanced pair of the projection of W on the span of `basis`, in the metrics."""
        up = self._onto(times_root(self._right, basis))
        if self._right is None:
            return rebalanced(up, basis.T)
        seen = seen_by(self._left, up)
        down = times_root(self._left, seen).T @ self._weight.to(basis.dtype)
        squares = symmetric(gram(seen, torch.float64))
        scale = squares.diagonal().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        values, vectors = torch.linalg.eigh(squares / scale / scale[:, None])
        alike = values[0].item() < 0.01  # columns nearly dependent, perhaps by rounding
        if alike and basis.dtype != torch.float64:
            return self._project(basis.double())
        # change @ change^T is the pseudo-inverse of B^T B.
        change = (
            vectors
            * torch.where(values > len(values) * torch.finfo(values.dtype).eps, values.rsqrt(), 0.0)
            / scale[:, None]
        )
        balance = (
            None
            if alike
            else balancing(*(change.T @ symmetric(gram(side, torch.float64)) @ change for side in (up, down.T)))
        )
        if balance is None:
            return balanced(up.double() @ change, change.T @ down.double())
        return up @ (change @ balance[0]).to(up), (balance[1] @ change.T).to(down) @ down

    def _decompose(self, dtype: torch.dtype) -> None:
        moment, n = self._moment, self._weight.shape[1]
        try:
            squares, vectors = torch.linalg.eigh(
                bordered(moment.gram(self._weight, dtype) if moment else gram(self._measured(dtype), dtype))
            )
        except torch.linalg.LinAlgError:  # no convergence, as with some matrices of low rank on GPUs
            return self._decompose(torch.float64) if dtype != torch.float64 else self._decompose_exactly()
        squares, vectors = squares[-n:], vectors[:n, -n:]
        off = rounding(dtype) * max(squares.norm().item(), moment.terms(self._weight) if moment else 0.0)
        if moment and squares[0].item() < -off:
            self._take_root()
            return self._decompose(dtype)
        self._squares, self._vectors, self._off = squares.flip(0), vectors.flip(1), off

    def _decompose_exactly(self) -> None:
        self._take_root()
        _, singular, vh = torch.linalg.svd(self._measured(torch.float64).double(), full_matrices=False)
        self._squares, self._vectors, self._off = singular.square(), vh.T, 0.0

    def _take_root(self) -> None:
        if self._moment is not None:
            self._left, self._moment = Metric(self._moment.root().root.to(self._weight.dtype)), None

    def _measured(self, dtype: torch.dtype) -> Tensor:
        """L W R in `dtype`; W itself where there are no metrics."""
        if self._left is None and self._right is None:
            return self._weight
        return seen_by(self._right, seen_by(self._left, self._weight.to(dtype)).T).T

    def _error(self, up: Tensor, down: Tensor) -> float:
        """||W - up down||_F / ||W||_F, measured."""
        up, down = up.to(self._weight), down.to(self._weight)
        rest = (
            torch.addmm(rows, part, down, alpha=-1).norm()
            for rows, part in zip(self._weight.split(ROWS), up.split(ROWS), strict=True)
        )
        whole = self._weight.norm().item()
        return torch.stack(list(rest)).norm().item() / whole if whole > 0 else 0.0

    def _metric_error(self, up: Tensor, down: Tensor) -> float:
        """The relative error in the metrics, measured."""
        rest = torch.addmm(self._weight, up.to(self._weight), down.to(self._weight), alpha=-1)
        whole = self._squares.clamp_min(0).sum().sqrt().item()
        lost = (
            max(self._moment.cost(rest), 0.0) ** 0.5
            if self._moment
            else seen_by(self._right, seen_by(self._left, rest).T).norm().item()
        )
        return lost / whole if whole > 0 else 0.0

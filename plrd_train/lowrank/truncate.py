"""The best rank-r pair of factors of a matrix W, and of a product A·B that is never formed.

Both cost what the smaller side costs. Of a dense W (m x n): eigenvectors V of the Gram matrix of the smaller side, then W ≈ (W V_r) V_r^T, a
projection, which is why its error is that of the subspace alone and why it is exact at full rank, whatever the accuracy of the eigenvalues. A bound
on what the subspace may have lost is checked; where it does not hold, the Gram matrix is formed in float64, and at last W itself is decomposed. Of
a product: QR of both factors, and the above on the small core.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The relative error may exceed the optimum by this share of it; below ABSOLUTE of ||W|| it may be anything up to that, since factors stored in
# float32 are themselves off by about 1e-7.
RELATIVE = 5e-4
ABSOLUTE = 5e-6


@dataclass(frozen=True)
class Factors:
    """W ≈ up @ down, balanced: up^T up = down down^T = diag(singular values).

    `up` is (m, r), `down` (r, n), both float32; `rel_error` is ||W - up @ down||_F / ||W||_F (0 for W = 0).
    """

    up: Tensor
    down: Tensor
    rel_error: float


def truncate(weight: Tensor, rank: int) -> Factors:
    """The best pair of rank `rank` of a dense `weight` (m, n), of any floating dtype, on its device.

    The Frobenius error is within 1 + RELATIVE of the optimum (Eckart and Young 1936) or below ABSOLUTE of the norm.
    Raises ValueError where `rank` is not in 1..min(m, n), or `weight` holds NaN or Inf.
    """
    _check(weight, "weight")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} of a {weight.shape[0]} x {weight.shape[1]} matrix: it must lie in 1..{min(weight.shape)}")
    scale = weight.abs().max().item()
    if scale == 0.0:
        m, n = weight.shape
        zeros = weight.new_zeros((), dtype=torch.float32)
        return Factors(zeros.expand(m, rank).clone(), zeros.expand(rank, n).clone(), 0.0)
    # Divided by its largest entry, so that squares neither overflow nor vanish.
    w = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32) / scale
    tall = w.shape[0] >= w.shape[1]
    basis, lost = _leading_basis(w if tall else w.T, rank)  # of the smaller side, orthonormal columns
    coordinates = w @ basis if tall else w.T @ basis
    outer, inner = _balance(coordinates, basis, math.sqrt(scale))
    up, down = (outer, inner.T) if tall else (inner, outer.T)
    return Factors(up.float().contiguous(), down.float().contiguous(), lost)


def truncate_product(up: Tensor, down: Tensor, rank: int) -> Factors:
    """The best pair of rank `rank` of the product `up` (m, k) @ `down` (k, n), without forming it; k may be any, `rank` at most min(m, k, n).

    QR of both factors leaves a core of at most k x k with the singular values of the product; errors as for `truncate`, relative to the product.
    """
    _check(up, "up")
    _check(down, "down")
    # Householder QR keeps a nearly dependent column where Cholesky QR would fail; float64 keeps the small singular values of an ill-conditioned pair.
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    core = truncate(r_up @ r_down.T, rank)
    return Factors((q_up @ core.up.double()).float(), (core.down.double() @ q_down.T).float(), core.rel_error)


def _check(matrix: Tensor, name: str) -> None:
    if matrix.ndim != 2:
        raise ValueError(f"{name} has {matrix.ndim} dimensions, not 2")
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name} holds NaN or Inf")


def _leading_basis(w: Tensor, rank: int) -> tuple[Tensor, float]:
    """An orthonormal basis (n, rank) of the leading right singular subspace of `w` (m >= n), and the relative error of projecting on it."""
    for dtype in dict.fromkeys((w.dtype, torch.float64)):
        basis, excess, optimum = _from_gram(w.to(dtype), rank)
        if rank == w.shape[1]:
            return basis.to(w.dtype), 0.0
        if excess <= max(2 * RELATIVE * optimum, (ABSOLUTE / 5) ** 2):
            return basis.to(w.dtype), _projection_error(w, basis.to(w.dtype))
    basis = torch.linalg.svd(w.double(), full_matrices=False).Vh[:rank].T
    return basis.to(w.dtype), _projection_error(w, basis.to(w.dtype))


def _from_gram(w: Tensor, rank: int) -> tuple[Tensor, float, float]:
    """(basis, bound on the excess of its squared relative error over the optimum, an estimate of that optimum) from the Gram matrix of `w`.

    A Gram matrix that is off by E (rounding: ||E||_2 about eps * sqrt(m) * lambda_max) has its leading eigenvectors lose at most
    2 * min(r, n - r) * ||E||_2 of the energy, by Ky Fan's principle applied to both matrices.
    """
    values, vectors = torch.linalg.eigh(w.T @ w)  # ascending
    total = values.sum().item()
    off = torch.finfo(w.dtype).eps * math.sqrt(w.shape[0]) * values[-1].item()
    excess = 2 * min(rank, w.shape[1] - rank) * off / total
    optimum = max(values[: w.shape[1] - rank].sum().item(), 0.0) / total
    return vectors[:, -rank:].flip(1), excess, optimum


def _projection_error(w: Tensor, basis: Tensor) -> float:
    """||w - (w basis) basis^T||_F / ||w||_F, from the difference itself: sqrt(total - kept) would lose all digits of a small error."""
    return ((w - (w @ basis) @ basis.T).norm() / w.norm()).item()


def _balance(coordinates: Tensor, basis: Tensor, root_scale: float) -> tuple[Tensor, Tensor]:
    """Split coordinates (m, r) and basis (n, r) so that column i has norm sqrt(singular value i) in both, without changing their product.

    A singular value of zero would make its pair of columns vanish in both factors, and with it both gradients: it is floored.
    """
    singular = coordinates.norm(dim=0)
    root = singular.clamp_min(torch.finfo(singular.dtype).eps * singular.max()).sqrt()
    return coordinates / root * root_scale, basis * root * root_scale

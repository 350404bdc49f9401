"""`pifa`: r rows of the rank-r matrix, and the other rows as combinations of these (pivoting factorization, arXiv
2501.19090).

A matrix W = up @ down of rank r has r independent rows W_p, the pivots, and W = F W_p, where r rows of F are those of
the identity. Stored are W_p (r, in) and the other rows C (out - r, r) of F. That is r (out + in - r) parameters, and as
many multiplications a token, in place of r (out + in), for exactly the same matrix. A packed pair is up = F, down =
W_p.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

PACKS = True
# Pivots are swapped while an entry of C is larger than this, since small entries keep rounding errors small.
LARGEST = 1.1


class Linear(nn.Module):
    """y = [basis(x), combine(basis(x))][order] + bias: a Linear that stores `rank` rows, and how the others combine
    them.

    `basis.weight` is (rank, in_features), `combine.weight` (out_features - rank, rank). `order` (out_features,) int32
    is the index of each output in the concatenation of both.
    """

    order: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__()
        self.basis = nn.Linear(in_features, rank, bias=False)
        self.combine = nn.Linear(rank, out_features - rank, bias=False)
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def in_features(self) -> int:
        return self.basis.in_features

    @property
    def out_features(self) -> int:
        return self.basis.out_features + self.combine.out_features

    def forward(self, x: Tensor) -> Tensor:
        pivots = self.basis(x)
        y = torch.cat([pivots, self.combine(pivots)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.basis.out_features}"


def params(out_features: int, in_features: int, rank: int) -> int:
    return rank * (out_features + in_features - rank)


def most_rank(out_features: int, in_features: int, params: float) -> int:
    both, whole = out_features + in_features, out_features * in_features
    if params >= whole:
        return min(out_features, in_features)
    budget = math.floor(params)
    # The smaller root of r (both - r) = budget, rounded down: with the root rounded up, r is never too large.
    square = both * both - 4 * budget
    root = math.isqrt(square)
    return (both - root - (root * root < square)) // 2


def pack(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """F and W_p, computed in float64. The first pivots are those of an LU decomposition with partial pivoting of an
    orthonormal basis of the columns. They are swapped while a swap multiplies their determinant by more than
    `LARGEST`."""
    rank = up.shape[1]
    basis = torch.linalg.qr(up.double()).Q
    swaps = torch.linalg.lu_factor(basis).pivots.tolist()
    rows = list(range(len(up)))
    for i, j in enumerate(swaps):
        rows[i], rows[j - 1] = rows[j - 1], rows[i]
    pivots = torch.tensor(rows[:rank], device=up.device)
    combined = torch.linalg.solve(basis[pivots], basis, left=False)
    for _ in range(len(up)):  # it ends, as each swap raises the determinant; far fewer swaps are needed
        largest = combined.abs().argmax()
        row, column = int(largest // rank), int(largest % rank)
        if combined[row, column].abs() <= LARGEST:
            break
        step = combined[row].clone()
        step[column] -= 1
        combined = torch.addr(combined, combined[:, column], step / combined[row, column], alpha=-1)
        pivots[column] = row
    rows_of_pivots = (up.double()[pivots] @ down.double()).float()
    combined[pivots] = torch.eye(rank, dtype=combined.dtype, device=up.device)
    return combined.float(), rows_of_pivots


def pack_bytes(out_features: int, in_features: int, rank: int) -> int:
    """In float64: `up`, its basis, the combined rows and their next step, and both factors of the pivot rows."""
    return 8 * (4 * out_features * rank + 2 * rank * in_features)


def stored(part: str, tensor: Tensor) -> dict[str, Tensor]:
    if part == "down.weight":
        return {"basis.weight": tensor}
    if part == "up.bias":
        return {"bias": tensor}
    pivots = _pivots(tensor)
    rest = torch.ones(len(tensor), dtype=torch.bool, device=tensor.device)
    rest[pivots] = False
    order = torch.empty(len(tensor), dtype=torch.int32, device=tensor.device)
    order[pivots] = torch.arange(len(pivots), dtype=torch.int32, device=tensor.device)
    order[rest] = torch.arange(len(pivots), len(tensor), dtype=torch.int32, device=tensor.device)
    return {"combine.weight": tensor[rest], "order": order}


def loaded(part: str, state: Callable[[str], Tensor]) -> Tensor:
    if part == "down.weight":
        return state("basis.weight")
    if part == "up.bias":
        return state("bias")
    combine = state("combine.weight")
    identity = torch.eye(combine.shape[1], dtype=combine.dtype, device=combine.device)
    return torch.cat([identity, combine])[state("order").long()]


def _pivots(up: Tensor) -> Tensor:
    """For each column of a packed `up`, the first row that is the row of the identity with its 1 there. Raises
    ValueError where there is none."""
    is_unit = (up != 0).sum(1) == 1
    columns = torch.where(is_unit, up.argmax(1), -1)
    ones = up.max(1).values == 1
    found = ((columns[:, None] == torch.arange(up.shape[1], device=up.device)) & ones[:, None]).int()
    if not bool(found.any(0).all()):
        raise ValueError("this pair is not packed: its `up` does not hold the rows of the identity")
    return found.argmax(0)

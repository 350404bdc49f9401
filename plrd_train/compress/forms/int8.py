"""`int8`: the pair of factors in 8-bit integers, with a scale for each row.

Row i of a factor is codes_i * scale_i, where scale_i is the smallest power of two that lets no code exceed 127. A code
times a power of two is exact in bfloat16 too, so that a member computes with the weights that were evaluated, whatever
its dtype. Parameters are counted as those of the pair; the weights of a member take half the bytes of bfloat16.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKS = True
LARGEST = 127


class Codes(nn.Module):
    """A matrix (rows, columns) as `codes` (rows, columns), int8, and `scale` (rows,), powers of two."""

    codes: Tensor
    scale: Tensor

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.register_buffer("codes", torch.zeros(rows, columns, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(rows))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype)[:, None], bias)


class Linear(nn.Module):
    """y = up(down(x)) + bias, with both factors as `Codes`."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__()
        self.down = Codes(rank, in_features)
        self.up = Codes(out_features, rank)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def in_features(self) -> int:
        return self.down.codes.shape[1]

    @property
    def out_features(self) -> int:
        return self.up.codes.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x), self.bias)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.up.codes.shape[1]}"


def params(out_features: int, in_features: int, rank: int) -> int:
    return rank * (out_features + in_features)


def most_rank(out_features: int, in_features: int, params: float) -> int:
    return int(params / (out_features + in_features))


def pack(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return _rounded(up), _rounded(down)


def pack_bytes(out_features: int, in_features: int, rank: int) -> int:
    """Of the larger factor its magnitudes, its codes and their product with the scales, in float32."""
    return 4 * 3 * max(out_features, in_features) * rank


def stored(part: str, tensor: Tensor) -> dict[str, Tensor]:
    if part == "up.bias":
        return {"bias": tensor}
    factor, scale = part.removesuffix(".weight"), _scale(tensor.float())
    codes = (tensor.float() / scale[:, None]).round().to(torch.int8)
    return {f"{factor}.codes": codes, f"{factor}.scale": scale.to(tensor.dtype)}


def loaded(part: str, state: Callable[[str], Tensor]) -> Tensor:
    if part == "up.bias":
        return state("bias")
    factor = part.removesuffix(".weight")
    scale = state(f"{factor}.scale")
    return state(f"{factor}.codes").to(scale.dtype) * scale[:, None]


def _rounded(factor: Tensor) -> Tensor:
    scale = _scale(factor)[:, None]
    return (factor / scale).round() * scale


def _scale(factor: Tensor) -> Tensor:
    """The smallest power of two of each row for which no code exceeds LARGEST; 1 for a row of zeros. Rounding to the
    codes leaves it as it is: the largest code is above LARGEST / 2."""
    mantissa, exponent = torch.frexp(factor.abs().amax(1) / LARGEST)  # mantissa in [0.5, 1), or 0
    power = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(mantissa == 0, 1.0, torch.ldexp(torch.ones_like(mantissa), power))

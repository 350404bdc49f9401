"""`lowrank`: the pair of factors itself, y = up(down(x)). PLRD as published (arXiv 2406.19995, section 3)."""

from collections.abc import Callable

from torch import Tensor

from plrd_train.compress.linear import LowRankLinear as Linear

__all__ = ["Linear"]
PACKS = False


def params(out_features: int, in_features: int, rank: int) -> int:
    return rank * (out_features + in_features)


def most_rank(out_features: int, in_features: int, params: float) -> int:
    return int(params / (out_features + in_features))


def pack(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return up, down


def pack_bytes(out_features: int, in_features: int, rank: int) -> int:
    return 0


def stored(part: str, tensor: Tensor) -> dict[str, Tensor]:
    return {part: tensor}


def loaded(part: str, state: Callable[[str], Tensor]) -> Tensor:
    return state(part)

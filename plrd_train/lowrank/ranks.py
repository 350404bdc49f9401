"""A ratio -> the rank of each Linear."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from plrd_train.lowrank.linear import LowRankLinear


@dataclass(frozen=True)
class Shape:
    """The weight of one eligible Linear: `out_features` x `in_features`, and its rank where it is low-rank already (None: dense)."""

    out_features: int
    in_features: int
    rank: int | None = None

    @classmethod
    def of(cls, linear: nn.Linear | LowRankLinear) -> "Shape":
        return cls(linear.out_features, linear.in_features, linear.rank if isinstance(linear, LowRankLinear) else None)

    @property
    def dense_params(self) -> int:
        """Parameters of the dense weight; biases are neither factored nor counted."""
        return self.out_features * self.in_features

    def params(self, rank: int | None) -> int:
        """Parameters of what stands in its place at `rank` (None: dense)."""
        return self.dense_params if rank is None else rank * (self.out_features + self.in_features)

    def shrinks(self, rank: int) -> bool:
        return self.params(rank) < self.dense_params


def uniform(shapes: Mapping[str, Shape], ratio: float, multiple: int = 1) -> dict[str, int]:
    """The same ratio for every Linear (PLRD as published): rank = floor(m n / (m + n) / ratio), rounded down to `multiple` (1: not rounded).

    A Linear for which two factors would be no smaller than it is stays dense and is absent from the result, and so is one that is too small for a
    single `multiple`. Ranks never grow: a Linear that is low-rank already keeps at most the rank it has.
    """
    ranks = {}
    for name, shape in shapes.items():
        rank = int(shape.dense_params / (shape.out_features + shape.in_features) / ratio) // multiple * multiple
        if shape.rank is not None:
            ranks[name] = min(rank, shape.rank) if rank else shape.rank
        elif rank and shape.shrinks(rank):
            ranks[name] = rank
    return ranks


ALLOCATIONS: dict[str, Callable[..., dict[str, int]]] = {"uniform": uniform}


def ratio_of(shapes: Mapping[str, Shape], ranks: Mapping[str, int]) -> float:
    """Parameters of all eligible Linears when dense over those of what stands in their place at `ranks`, those left dense included; 1.0 for none."""
    dense = sum(shape.dense_params for shape in shapes.values())
    return dense / sum(shape.params(ranks.get(name)) for name, shape in shapes.items()) if dense else 1.0

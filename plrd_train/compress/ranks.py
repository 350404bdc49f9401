"""Linears by their shape, and what their ranks come to: parameters, and the ratio of a model."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from plrd_train.compress import forms
from plrd_train.compress.linear import LowRankLinear


@dataclass(frozen=True)
class Shape:
    """The weight of one eligible Linear: `out_features` x `in_features`, and its rank where it is low-rank already
    (None: dense). `form` (`plrd_train.compress.forms`) is what a rank is counted by."""

    out_features: int
    in_features: int
    rank: int | None = None
    form: str = "lowrank"

    @classmethod
    def of(cls, linear: nn.Linear | LowRankLinear, form: str = "lowrank") -> "Shape":
        return cls(
            linear.out_features, linear.in_features, linear.rank if isinstance(linear, LowRankLinear) else None, form
        )

    @property
    def dense_params(self) -> int:
        """Parameters of the dense weight; biases are neither factored nor counted."""
        return self.out_features * self.in_features

    def params(self, rank: int | None) -> int:
        """Parameters of what stands in its place at `rank` (None: dense)."""
        return (
            self.dense_params
            if rank is None
            else forms.get(self.form).params(self.out_features, self.in_features, rank)
        )

    def pair_params(self, rank: int | None) -> int:
        """Numbers of the pair of factors that it is trained as at `rank` (None: dense)."""
        return self.dense_params if rank is None else rank * (self.out_features + self.in_features)

    def most_rank(self, params: float) -> int:
        """The largest rank that takes at most so many parameters; 0: none."""
        rank: int = forms.get(self.form).most_rank(self.out_features, self.in_features, params)
        return rank

    def shrinks(self, rank: int) -> bool:
        return self.params(rank) < self.dense_params


def ratio_of(shapes: Mapping[str, Shape], ranks: Mapping[str, int]) -> float:
    """Parameters of all eligible Linears when dense over those of what stands in their place at `ranks`, those left
    dense included; 1.0 for none."""
    dense = sum(shape.dense_params for shape in shapes.values())
    return dense / sum(shape.params(ranks.get(name)) for name, shape in shapes.items()) if dense else 1.0

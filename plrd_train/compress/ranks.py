"""The shape of a Linear, and the parameters and the ratio that ranks come to."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from plrd_train.compress import forms
from plrd_train.compress.linear import LowRankLinear


@dataclass(frozen=True)
class Shape:
    """The size of one eligible Linear: `out_features` x `in_features`, and its rank where it is low-rank (None: dense).
    `form` (`plrd_train.compress.forms`) says how many parameters a rank costs."""

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
        """Parameters of the Linear at `rank` (None: dense)."""
        return (
            self.dense_params
            if rank is None
            else forms.get(self.form).params(self.out_features, self.in_features, rank)
        )

    def pair_params(self, rank: int | None) -> int:
        """Entries of the pair of factors as which it is trained at `rank` (None: of the dense weight)."""
        return self.dense_params if rank is None else rank * (self.out_features + self.in_features)

    def most_rank(self, params: float) -> int:
        """The largest rank that takes at most `params` parameters; 0: none."""
        rank: int = forms.get(self.form).most_rank(self.out_features, self.in_features, params)
        return rank

    def shrinks(self, rank: int) -> bool:
        """Whether that rank takes fewer parameters than the dense weight."""
        return self.params(rank) < self.dense_params


def ratio_of(shapes: Mapping[str, Shape], ranks: Mapping[str, int]) -> float:
    """The dense parameters of all eligible Linears over their parameters at `ranks`. A Linear that is not in `ranks` is
    dense. 1.0 where there are no Linears."""
    dense = sum(shape.dense_params for shape in shapes.values())
    return dense / sum(shape.params(ranks.get(name)) for name, shape in shapes.items()) if dense else 1.0

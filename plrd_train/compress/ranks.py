"""A ratio -> the rank of each Linear."""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plrd_train.compress import forms
from plrd_train.compress.linear import LowRankLinear

# What a Linear loses goes as its relative error to the one power and, by `energy`, as its parameters to the other.
OF_ERROR, OF_SIZE = 2.5, 0.25
# The least that a Linear's growth of the loss counts, as a share of the largest one.
LEAST = 1e-6
# A rank, and what the model's mean nll grew by with one Linear alone at that rank.
Measured = tuple[int, float]


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
        return forms.get(self.form).most_rank(self.out_features, self.in_features, params)

    def shrinks(self, rank: int) -> bool:
        return self.params(rank) < self.dense_params


def uniform(
    shapes: Mapping[str, Shape],
    ratio: float,
    multiple: int = 1,
    values: Mapping[str, Tensor] | None = None,
    measured: Mapping[str, Measured] | None = None,
) -> dict[str, int]:
    """The same ratio for every Linear (PLRD as published): the largest rank whose form has at most m n / ratio
    parameters, as floor(m n / (m + n) / ratio) for two factors, rounded down to `multiple` (1: not rounded).

    A Linear for which that would be no smaller than it is stays dense and is absent from the result, and so is one that
    is too small for a single `multiple`. Ranks never grow: a Linear that is low-rank already keeps at most the rank it
    has. Spectra and losses are of no account.
    """
    ranks = {}
    for name, shape in shapes.items():
        rank = shape.most_rank(shape.dense_params / ratio) // multiple * multiple
        if shape.rank is not None:
            ranks[name] = min(rank, shape.rank) if rank else shape.rank
        elif rank and shape.shrinks(rank):
            ranks[name] = rank
    return ranks


def energy(
    shapes: Mapping[str, Shape],
    ratio: float,
    multiple: int,
    values: Mapping[str, Tensor],
    measured: Mapping[str, Measured] | None = None,
) -> dict[str, int]:
    """One budget for all Linears together, spent (`split`) where a parameter saves the most loss, by the spectra alone.

    What a Linear loses at rank r is a power of its relative error, the root of the share of its energy that is cut off
    (the squares of its singular values, `values[name]`, which `Spectral.values` are), times a power of its size; of
    those tried, the powers after which the least perplexity is lost (docs/methods.md).
    """
    lost = {name: _errors(values[name]) ** OF_ERROR * shape.dense_params**OF_SIZE for name, shape in shapes.items()}
    return split(shapes, ratio, multiple, lost)


def sensitivity(
    shapes: Mapping[str, Shape],
    ratio: float,
    multiple: int,
    values: Mapping[str, Tensor],
    measured: Mapping[str, Measured],
) -> dict[str, int]:
    """The same by what the model's loss was `measured` to grow by with each Linear alone at one rank
    (`plrd_train.compress.sensitivity`).

    At other ranks it is taken to grow as the power of the relative error that `energy` takes. Where it did not grow at
    all, next to nothing is lost: such Linears get the least, and share what of the budget no other has use for.
    """
    least = LEAST * max(grown for _, grown in measured.values())
    lost = {}
    for name, (rank, grown) in measured.items():
        errors = _errors(values[name]) ** OF_ERROR
        there = errors[rank - 1].item()
        lost[name] = errors * (max(grown, least if least > 0 else 1.0) / there if there > 0 else 0.0)
    return split(shapes, ratio, multiple, lost)


def split(shapes: Mapping[str, Shape], ratio: float, multiple: int, lost: Mapping[str, Tensor]) -> dict[str, int]:
    """One budget for all Linears, 1 / `ratio` of their dense parameters, spent where a parameter saves the most.

    `lost[name]` (k,) is what is lost with that Linear at rank 1, 2, …, k; as it is now nothing is. Ranks are multiples
    of `multiple`; a Linear that is better left as it is, dense or low-rank, stays so.

    By one price a parameter for all of them (Lagrange), each Linear takes all steps that are worth it, and what is left
    over goes to the steps that come next. So the total is at most the budget and less than one step below it, or what
    there is already; where one step each is too much, it is that.
    """
    curves = {name: _curve(shape, lost[name].double(), multiple) for name, shape in shapes.items()}
    budget = sum(shape.dense_params for shape in shapes.values()) / ratio
    chosen, spent = _at_price(curves, 0.0)
    if spent > budget:
        low, high = 0.0, max(lost.max().item() for _, lost in curves.values())  # a step costs at least one parameter
        for _ in range(100):
            price = (low + high) / 2
            chosen, spent = _at_price(curves, price)
            low, high = (price, high) if spent > budget else (low, price)
        chosen, spent = _at_price(curves, high)
        _spend(curves, chosen, budget - spent)
    ranks = {
        name: multiple * (i + 1) if i + 1 < len(curves[name][0]) else shapes[name].rank for name, i in chosen.items()
    }
    return {name: rank for name, rank in ranks.items() if rank is not None}


def _errors(values: Tensor) -> Tensor:
    """The relative error at rank 1, 2, …, k of the k singular values, in float64."""
    squares = values.double().square()
    share = (squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)).cumsum(0)
    return (1 - share).clamp_min(0).sqrt()


def _curve(shape: Shape, lost: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Parameters of a Linear at each rank that it may have, the last being what it is now, and what is lost there."""
    whole = shape.params(shape.rank)
    steps = min(len(lost), shape.most_rank(whole - 1)) // multiple
    params = torch.tensor([float(shape.params(multiple * (i + 1))) for i in range(steps)], dtype=torch.float64)
    return torch.cat([params, params.new_tensor([whole])]), torch.cat(
        [lost[multiple - 1 :: multiple][:steps], lost.new_zeros(1)]
    )


def _at_price(curves: Mapping[str, tuple[Tensor, Tensor]], price: float) -> tuple[dict[str, int], float]:
    """What each Linear takes at that price of a parameter, as an index into its curve, and the parameters of all."""
    chosen = {name: int((lost + price * params).argmin()) for name, (params, lost) in curves.items()}
    return chosen, sum(params[chosen[name]].item() for name, (params, _) in curves.items())


def _spend(curves: Mapping[str, tuple[Tensor, Tensor]], chosen: dict[str, int], left: float) -> None:
    """Take further steps while one fits into what is `left`, those first that save most a parameter."""

    def step_of(name: str) -> tuple[float, str, float]:
        params, lost = (side[chosen[name] + 1] - side[chosen[name]] for side in curves[name])
        return (lost / params).item(), name, params.item()

    steps = [step_of(name) for name, (params, _) in curves.items() if chosen[name] + 1 < len(params)]
    heapq.heapify(steps)
    while steps:
        _, name, params = heapq.heappop(steps)
        if params <= left:
            left -= params
            chosen[name] += 1
            if chosen[name] + 1 < len(curves[name][0]):
                heapq.heappush(steps, step_of(name))


def ratio_of(shapes: Mapping[str, Shape], ranks: Mapping[str, int]) -> float:
    """Parameters of all eligible Linears when dense over those of what stands in their place at `ranks`, those left
    dense included; 1.0 for none."""
    dense = sum(shape.dense_params for shape in shapes.values())
    return dense / sum(shape.params(ranks.get(name)) for name, shape in shapes.items()) if dense else 1.0


# Each takes (shapes, ratio, multiple, values, measured); those in SPECTRAL look at `values`, those in MEASURING at
# `measured` too.
ALLOCATIONS: dict[str, Callable[..., dict[str, int]]] = {
    "uniform": uniform,
    "energy": energy,
    "sensitivity": sensitivity,
}
SPECTRAL = frozenset({"energy", "sensitivity"})
MEASURING = frozenset({"sensitivity"})

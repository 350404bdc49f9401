"""One budget of parameters shared out over all Linears, so that the estimated loss is least."""

import heapq
from collections.abc import Mapping

import torch
from torch import Tensor

from plrd_train.compress.ranks import Shape

# The loss that a Linear causes grows as this power of its relative error.
OF_ERROR = 2.5


def split(shapes: Mapping[str, Shape], ratio: float, multiple: int, lost: Mapping[str, Tensor]) -> dict[str, int]:
    """The ranks of least total loss, with at most 1 / `ratio` of the dense parameters of all Linears.

    `lost[name]` (k,) is the estimated loss with that Linear at rank 1, 2, …, k; unchanged, a Linear loses nothing.
    Ranks are multiples of `multiple`. A Linear stays unchanged, dense or low-rank, where that is best.

    All Linears pay one price for a parameter (a Lagrange multiplier): each takes the rank of least loss plus price. The
    rest of the budget then goes to the next larger ranks. So the total is at most the budget, and less than one step
    below it. Two exceptions: it is the present total where that is within the budget, and that of one `multiple` for
    each Linear where even that exceeds the budget.
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


def relative_errors(values: Tensor) -> Tensor:
    """The relative error of cutting at rank 1, 2, …, k, by the k singular values, in float64."""
    squares = values.double().square()
    share = (squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)).cumsum(0)
    return (1 - share).clamp_min(0).sqrt()


def _curve(shape: Shape, lost: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """The parameters of a Linear, and its loss, at each rank that it may have. The last entry is the present Linear."""
    whole = shape.params(shape.rank)
    steps = min(len(lost), shape.most_rank(whole - 1)) // multiple
    params = torch.tensor([float(shape.params(multiple * (i + 1))) for i in range(steps)], dtype=torch.float64)
    return torch.cat([params, params.new_tensor([whole])]), torch.cat(
        [lost[multiple - 1 :: multiple][:steps], lost.new_zeros(1)]
    )


def _at_price(curves: Mapping[str, tuple[Tensor, Tensor]], price: float) -> tuple[dict[str, int], float]:
    """The best index into the curve of each Linear at that price of a parameter, and the parameters of all together."""
    chosen = {name: int((lost + price * params).argmin()) for name, (params, lost) in curves.items()}
    return chosen, sum(params[chosen[name]].item() for name, (params, _) in curves.items())


def _spend(curves: Mapping[str, tuple[Tensor, Tensor]], chosen: dict[str, int], left: float) -> None:
    """Raise ranks by single steps that fit into the parameters that are `left`, the most saving per parameter first."""

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

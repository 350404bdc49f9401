"""A budget for all parameters -> the rank of each Linear of the last blocks (LLM-ROM, arXiv 2312.07046, section 3)."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from plrd_train.compress.allocations.uniform import Allocation as Uniform
from plrd_train.compress.ranks import Shape

# The budget, as a share of all parameters, and the share of the blocks that are factored for it. Of LLaMA-7B's 32
# blocks the paper factors the last 24, 12 and 8; these keep about 0.33, 0.46 and 0.60 of their own parameters.
_BUDGETS = (0.0, 0.5, 0.8, 0.9, 1.0)
_FACTORED = (1.0, 24 / 32, 12 / 32, 8 / 32, 0.0)


def last_blocks(
    shapes: Mapping[str, Shape], blocks: Sequence[str], params: int, budget: float, multiple: int = 1
) -> dict[str, int]:
    """The ranks at which a model of `params` parameters keeps the share `budget` of them, or slightly less. Only the
    last blocks are factored.

    `blocks` are the names of all blocks in order. The number of factored blocks is interpolated linearly between those
    of the paper, and raised where that is too few. All factored Linears get the same ratio, and `uniform` gives their
    ranks. Raises ValueError where no ranks reach the budget.
    """
    if not 0 < budget < 1:
        raise ValueError(f"a budget of {budget:g}: it is a share of the parameters, above 0 and below 1")
    i = min(bisect_right(_BUDGETS, budget), len(_BUDGETS) - 1)
    share = _FACTORED[i - 1] + (budget - _BUDGETS[i - 1]) / (_BUDGETS[i] - _BUDGETS[i - 1]) * (
        _FACTORED[i] - _FACTORED[i - 1]
    )
    for count in range(max(1, round(share * len(blocks))), len(blocks) + 1):
        chosen = tuple(f"{block}." for block in blocks[-count:])
        inside = {name: shape for name, shape in shapes.items() if name.startswith(chosen)}
        now = sum(shape.params(shape.rank) for shape in inside.values())
        left = now - (1 - budget) * params
        if left <= 0:
            continue
        ratio = sum(shape.dense_params for shape in inside.values()) / left
        ranks = Uniform(multiple).ranks(inside, ratio)
        if sum(shape.params(ranks.get(name)) for name, shape in inside.items()) <= left:
            return ranks
    raise ValueError(
        f"a budget of {budget:g}: the Linears of all {len(blocks)} blocks together cannot give up that much"
    )

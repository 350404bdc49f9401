"""A budget for all parameters -> the rank of each Linear of the last blocks (LLM-ROM, arXiv 2312.07046, section 3)."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from plrd_train.compress.allocations.uniform import Allocation as Uniform
from plrd_train.compress.ranks import Shape

# The share of all parameters that is kept, and the share of the blocks that are factored for it: of LLaMA-7B's 32 the
# last 24, 12 and 8, whose own budgets are then about 0.33, 0.46 and 0.60.
_KEPT = (0.0, 0.5, 0.8, 0.9, 1.0)
_FACTORED = (1.0, 24 / 32, 12 / 32, 8 / 32, 0.0)


def last_blocks(
    shapes: Mapping[str, Shape], blocks: Sequence[str], params: int, budget: float, multiple: int = 1
) -> dict[str, int]:
    """The ranks at which a model of `params` parameters keeps the share `budget` of them, or a little less, and its
    first `blocks` stay as they are.

    `blocks` are the names of the model's blocks in order. The number of factored blocks is the paper's, in between by
    linear interpolation, and one more for as long as it takes to be possible; their budget, the same for all of them,
    follows from it, and the rank of each Linear by `uniform`. Raises ValueError where no ranks lead there.
    """
    if not 0 < budget < 1:
        raise ValueError(f"a budget of {budget:g}: it is a share of the parameters, above 0 and below 1")
    i = min(bisect_right(_KEPT, budget), len(_KEPT) - 1)
    share = _FACTORED[i - 1] + (budget - _KEPT[i - 1]) / (_KEPT[i] - _KEPT[i - 1]) * (_FACTORED[i] - _FACTORED[i - 1])
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

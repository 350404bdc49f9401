"""The stages of a family: their ratios and their budgets."""

import math
from typing import Annotated

from pydantic import AfterValidator, Field

from plrd_train.settings import Positive, section


def _ratios(ratios: tuple[float, ...]) -> tuple[float, ...]:
    for before, ratio in zip((1.0, *ratios), ratios, strict=False):
        if not math.isfinite(ratio) or ratio < 1.0:
            raise ValueError(f"a ratio of {ratio} makes the model no smaller; ratios start at 1")
        if ratio <= before and before != 1.0:
            raise ValueError(f"{ratio} comes after {before}: ratios must grow from stage to stage")
    return ratios


Ratios = Annotated[tuple[float, ...], AfterValidator(_ratios)]


@section
class Stages:
    ratios: Ratios
    tokens: Positive | tuple[Positive, ...] | None
    total_tokens: Positive | None
    # How many times its predecessor's share of `total_tokens` a stage gets.
    growth: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

    def budgets(self) -> tuple[int, ...]:
        """Tokens of each stage."""
        n = len(self.ratios)
        if isinstance(self.tokens, tuple):
            return self.tokens
        if self.tokens is not None:
            return (self.tokens,) * n
        shares = [self.growth**i for i in range(n)]
        return tuple(int((self.total_tokens or 0) * share / sum(shares)) for share in shares)

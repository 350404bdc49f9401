"""`uniform`: the same ratio for every Linear, PLRD as published (arXiv 2406.19995)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from plrd_train.compress.ranks import Shape


@dataclass(frozen=True)
class Allocation:
    """Ranks are rounded down to a multiple of `multiple`."""

    spectra: ClassVar[bool] = False
    losses: ClassVar[bool] = False

    multiple: Annotated[int, Ge(1)]

    def ranks(
        self,
        shapes: Mapping[str, Shape],
        ratio: float,
        values: Mapping[str, Tensor] | None = None,
        losses: Mapping[str, float] | None = None,
    ) -> dict[str, int]:
        """For each Linear the largest rank whose form has at most m n / ratio parameters: floor(m n / (m + n) / ratio)
        for two factors.

        A Linear stays dense, and is not in the result, where that rank saves no parameters or is below `multiple`.
        Ranks never grow: a low-rank Linear keeps its rank where that is smaller.
        """
        found = {}
        for name, shape in shapes.items():
            rank = shape.most_rank(shape.dense_params / ratio) // self.multiple * self.multiple
            if shape.rank is not None:
                found[name] = min(rank, shape.rank) if rank else shape.rank
            elif rank and shape.shrinks(rank):
                found[name] = rank
        return found

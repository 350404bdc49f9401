"""The pairs of a live sharded model as their form stores them: each is packed by its owner, round by round."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from plrd_train.compress import forms
from plrd_train.compress.algebra.gram import Factors
from plrd_train.compress.contracts import Decomposed, Live
from plrd_train.compress.linear import LowRankLinear
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import decompose


def packed(engine: Live, form: str) -> Iterator[Decomposed]:
    """The shards of each pair of the model in `engine`, packed by `form`; the model is left as it is. A collective at
    each step. Raises DecompositionError, on every rank alike, where a pair cannot be packed."""
    pairs = {name: module for name, module in engine.model.named_modules() if isinstance(module, LowRankLinear)}
    shapes = {name: Shape.of(pair) for name, pair in pairs.items()}
    yield from decompose(engine, shapes, {name: pair.rank for name, pair in pairs.items()}, Packer(form))


@dataclass(frozen=True)
class Packer:
    """A form as a method that keeps the rank and the product."""

    sequential: ClassVar[bool] = False
    statistic: ClassVar[str | None] = None

    form: str

    def dense(self, weight: Tensor, statistic: Any = None) -> Any:
        raise ValueError("a dense weight has no pair to pack")

    def product(self, up: Tensor, down: Tensor, statistic: Any = None) -> Any:
        return _Packed(*forms.get(self.form).pack(up, down))

    def peak_bytes(self, shape: Shape) -> int:
        size: int = forms.get(self.form).pack_bytes(shape.out_features, shape.in_features, shape.rank or 0)
        return size


@dataclass(frozen=True)
class _Packed:
    up: Tensor
    down: Tensor

    def cut(self, rank: int) -> Factors:
        return Factors(self.up, self.down, 0.0)

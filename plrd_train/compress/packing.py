"""The pairs of factors of a live sharded model, packed as a form stores them, each by its owner."""

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
    """Each pair of the model in `engine`, packed by `form`, as shards; the model is left unchanged. Each step of the
    iteration is a collective. Raises DecompositionError, on every rank alike, where a pair cannot be packed."""
    pairs = {name: module for name, module in engine.model.named_modules() if isinstance(module, LowRankLinear)}
    shapes = {name: Shape.of(pair) for name, pair in pairs.items()}
    yield from decompose(engine, shapes, {name: pair.rank for name, pair in pairs.items()}, Packer(form))


@dataclass(frozen=True)
class Packer:
    """The packing of a form as a method, which changes neither the rank nor the product."""

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

"""How a weight becomes two factors. One file a method, named as the method; adding a file (and its YAML in
conf/factorizer/) adds the method."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from plrd_train.compress.algebra.truncate import Spectral
from plrd_train.compress.contracts import Block, Cache, Decomposed, Shards
from plrd_train.compress.ranks import Shape
from plrd_train.registry import Registry


class Factorizer(Protocol):
    """What each file here defines, as a frozen dataclass named `Factorizer` whose fields are the method's own
    settings."""

    sequential: ClassVar[bool]
    """Whether a Linear is factored on the inputs that the Linears before it give once they are factored: then it is
    `Sequential`."""

    statistic: ClassVar[str | None]
    """The name of the statistic (`plrd_train.compress.statistics`) that it needs of each Linear; None: none. A method
    that needs one has a setting `calibration_tokens`."""

    def dense(self, weight: Tensor, statistic: Any) -> Spectral:
        """Decompose a dense `weight` (out, in). `statistic` is the Linear's statistic of that name, or None."""
        ...

    def product(self, up: Tensor, down: Tensor, statistic: Any) -> Spectral:
        """Decompose a pair that is low-rank already, `up` (out, k) and `down` (k, in)."""
        ...

    def peak_bytes(self, shape: Shape) -> int:
        """What decomposing one Linear of that shape and cutting it takes beyond the gathered float32 weight, in
        bytes."""
        ...


class Sequential(Factorizer, Protocol):
    """A method that takes the blocks of a model in order. Its `dense` and `product` serve where spectra are asked for
    first, to choose the ranks by: they are then given the statistics of the model as it stands."""

    trains_blocks: ClassVar[bool]
    """Whether it trains the factors of a block, and so holds the block as it was beside it."""

    def in_order(
        self,
        engine: Shards,
        walk: Callable[[], Iterator[Block]],
        shapes: Mapping[str, Shape],
        ranks: Mapping[str, int],
        kept: Cache | None = None,
    ) -> Iterator[Decomposed]:
        """Factor every Linear named in `ranks` to that rank and yield its factors as shards, by
        `plrd_train.compress.finished.block_by_block`. Each `walk` begins anew, over the weights of `engine` and all of
        the calibration text."""
        ...


METHODS = Registry("method", "compress.methods", settings="Factorizer")

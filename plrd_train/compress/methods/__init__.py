"""How a weight becomes two factors. One file a method, named as the method; adding a file (and its YAML in
conf/factorizer/) adds the method."""

from typing import Any, ClassVar, Protocol

from torch import Tensor

from plrd_train.compress.algebra.truncate import Spectral
from plrd_train.compress.contracts import BlockTask, FactorReport
from plrd_train.compress.ranks import Shape
from plrd_train.registry import Registry


class Method(Protocol):
    """What each file here defines, as a frozen dataclass named `Method` whose fields are its settings."""

    sequential: ClassVar[bool]
    """Whether a Linear is factored on the inputs that it receives once the Linears before it are factored. Such a
    method is a `SequentialMethod`."""

    statistic: ClassVar[str | None]
    """The name of the statistic (`plrd_train.compress.statistics`) that it needs of each Linear; None: none. A method
    that needs one has a setting `calibration_tokens`."""

    def dense(self, weight: Tensor, statistic: Any) -> Spectral:
        """Decompose a dense `weight` (out, in), float32. `statistic` is the Linear's statistic, or None. Raises
        ValueError where a number is not finite."""
        ...

    def product(self, up: Tensor, down: Tensor, statistic: Any) -> Spectral:
        """Decompose the product of `up` (out, k) and `down` (k, in), the factors of a Linear that is low-rank already;
        otherwise as `dense`."""
        ...

    def peak_bytes(self, shape: Shape) -> int:
        """The most bytes that decomposing and cutting one Linear of that shape takes, beside its float32 weight."""
        ...


class SequentialMethod(Method, Protocol):
    """A method that takes the blocks of a model in order. `plrd_train.compress.sequential` gives it block after block;
    `plrd_train.compress.steps` has the parts that it is made of.

    Where the ranks depend on spectra, `dense` and `product` give these, by the statistics of the model as it was.
    """

    keeps_original: ClassVar[bool]
    """Whether it compares a block with the block as it was. Then two blocks are in memory, and the hidden states before
    each."""

    trains_blocks: ClassVar[bool]
    """Whether it trains the factors of a block, so that the plan counts their gradients and optimizer moments."""

    def factor_block(self, task: BlockTask) -> dict[str, FactorReport]:
        """Replace each of `task.linears` in the block by factors of its rank, on every rank alike. Later blocks receive
        the outputs of the block as it is then. The result names each Linear by its name in the model. A collective.
        Raises DecompositionError, on every rank alike."""
        ...


METHODS = Registry("method", "compress.methods", settings="Method")

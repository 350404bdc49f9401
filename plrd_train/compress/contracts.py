"""The protocols and records that the modules of this folder share, so that none of them imports another in a circle.

Imports run one way: `algebra` imports torch alone, `ranks` knows the forms, and the rest of the folder builds on these
and on this module. What a form, a method, a statistic or an allocation has to define stands in the `__init__.py` of its
own folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plrd_train.compress.ranks import Shape

# The arguments of a block's forward beside its hidden states: positional and by keyword.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class DecompositionError(ValueError):
    """A weight that cannot be factored. The message names it."""


class AllocationError(ValueError):
    """A ratio that no ranks reach. The message names the config key."""


class Shards(Protocol):
    """A model whose parameters are sharded over ranks, as every engine holds one. `gather`, `scatter` and `share` are
    collectives: all ranks call them alike, in the same order."""

    rank: int
    world_size: int
    device: torch.device

    def gather(self, name: str, owner: int) -> Callable[[], Tensor | None]:
        """Begin to gather the parameter `name`. The function that is returned waits until that is done, and returns
        the whole float32 parameter on rank `owner` and None on the other ranks. The parameter must not change before
        that function has returned on every rank."""
        ...

    def scatter(self, tensor: Tensor | None, shape: tuple[int, ...], owner: int) -> Tensor:
        """This rank's shard of the float32 `tensor` of that shape, which rank `owner` holds. It is sharded as the
        engine shards a parameter of that shape."""
        ...

    def share(self, value: object) -> list[Any]:
        """The small picklable `value` of every rank, in rank order, on every rank."""
        ...


class Live(Shards, Protocol):
    """A sharded causal LM that can run, as every engine holds one."""

    @property
    def model(self) -> nn.Module: ...


class Architecture(Protocol):
    """The structure of a causal LM, without its weights."""

    def build(self) -> nn.Module:
        """The model in float32, on the current default device."""
        ...

    def refill(self, model: nn.Module) -> None:
        """Compute the buffers that no checkpoint holds (rotary frequencies, …), once the model has left the meta
        device."""
        ...


class BlockArchitecture(Architecture, Protocol):
    """An architecture whose blocks can be run one by one."""

    def outputs(self) -> Mapping[str, int]:
        """{block name: length of the tuple that the block returns, 0 for a tensor}. Raises DecompositionError where a
        block needs more than the hidden states of the block before it."""
        ...


@dataclass
class Block:
    """One block of the model while it is in memory: `module`, which is named `name` in the model, and its calls, one
    for each batch of this rank.

    `inputs` are the hidden states (n, length, hidden) that the block receives from the blocks before it, until
    `outputs` replaces them with those that it returns; `calls` are its other arguments.
    """

    name: str
    module: nn.Module
    inputs: list[Tensor]
    calls: list[Call]
    ran: bool = False

    def run(self, batch: int) -> Tensor:
        """The hidden states (n, length, hidden) that the block returns for that batch."""
        args, kwargs = self.calls[batch]
        output = self.module(self.inputs[batch], *args, **kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """The hidden states that the block returns for each batch. They overwrite `inputs`, to save memory."""
        if not self.ran:
            for batch in range(len(self.inputs)):
                self.inputs[batch] = self.run(batch)
            self.ran = True
        return self.inputs


@dataclass(frozen=True)
class BlockTask:
    """A block whose Linears are to be factored in order, as a sequential method is given it.

    `block` receives its inputs from the blocks before it as they were factored. It is the same on every rank but for
    the text. `original` is the block as it was, with inputs from the original blocks before it; None where the method
    does not keep it. `shapes` and `ranks` are those of the Linears of the whole model.
    """

    engine: Shards
    block: Block
    original: Block | None
    shapes: Mapping[str, Shape]
    ranks: Mapping[str, int]

    @property
    def linears(self) -> list[str]:
        """The Linears of the block that are to be factored, by their names in the block."""
        prefix = f"{self.block.name}."
        return [name.removeprefix(prefix) for name in self.ranks if name.startswith(prefix)]


@dataclass(frozen=True)
class FactorReport:
    """What every rank knows of a Linear that was factored: its owner, the seconds that it took there, and the errors of
    the factors (`plrd_train.compress.algebra.truncate.Factors`)."""

    owner: int
    seconds: float
    rel_error: float
    metric_error: float | None


@dataclass(frozen=True)
class Decomposed:
    """The factors of one Linear: this rank's shards of `up` (out, rank) and `down` (rank, in), and on every rank the
    same errors (`plrd_train.compress.algebra.truncate.Factors`) and seconds."""

    name: str
    rank: int
    up: Tensor = field(repr=False)
    down: Tensor = field(repr=False)
    rel_error: float
    metric_error: float | None
    seconds: float


class Cache(Protocol):
    """Where results outlive a crash. No method is a collective; after a restart another rank may get what one has
    put."""

    def get(self, name: str, key: str) -> dict[str, Tensor] | None:
        """The tensors that were put under `name` with this `key`, or None."""
        ...

    def put(self, name: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store `tensors` under `name`, in place of what is there. Raises OSError where that fails."""
        ...

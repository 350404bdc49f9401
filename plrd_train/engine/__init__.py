"""How a model lives on many devices: the protocol that every engine keeps, and the choice of one by name.

One file an engine, named as `engine=NAME`; adding a file (and its YAML in conf/engine/) adds the engine. A leading
underscore marks a part of engines. Nothing outside this package knows which one runs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from plrd_train.compress.contracts import Architecture, Decomposed, Shards
from plrd_train.errors import UserError
from plrd_train.registry import Registry
from plrd_train.runtime.world import World
from plrd_train.structure import Parameter


class Weights(Protocol):
    """Where the initial values of the parameters come from, by name."""

    def shape(self, name: str) -> torch.Size: ...

    def read(self, name: str, rows: slice) -> Tensor:
        """The `rows` of the parameter, of any floating dtype, on the CPU."""
        ...


@dataclass(frozen=True)
class Group:
    """How an optimizer treats a parameter: `options` are those of its torch parameter group, and `state` names the
    tensors that it keeps beside the parameter: float32, in the parameter's shape, zero before the first step."""

    options: dict[str, Any]
    state: tuple[str, ...]


# on_whole(parameters, shard_of, compute): for each parameter, a matrix, put together the whole tensor of which
# `shard_of(parameter)` is this rank's shard, on one of the ranks; apply `compute`, which keeps the shape, there; and
# yield the parameter with this rank's shard of the result. A collective; the parameters come in an order of its own.
OnWhole = Callable[
    [Sequence[Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], Iterator[tuple[Tensor, Tensor]]
]


class Optimizer(Protocol):
    """What an engine asks of an optimizer."""

    whole_matrices: ClassVar[bool]
    """Whether its update of a matrix depends on the whole of it, and not on each element alone."""

    def group(self, parameter: Parameter) -> Group:
        """The group of a parameter. Parameters of equal groups are treated alike."""
        ...

    def open(self, groups: list[dict[str, Any]], on_whole: OnWhole | None) -> torch.optim.Optimizer:
        """The optimizer of these torch groups ("params" and the options of a Group); `on_whole` only where
        `whole_matrices`.

        The engine sets "lr" of each group, and the attribute `found_inf`, a float32 scalar on the device, before each
        `step`. Where that is 1, `step` must leave parameters and state as they are.
        """
        ...


# What an optimizer keeps: the name of a state -> parameter -> a rank's shard.
State = Mapping[str, Mapping[str, Tensor]]


class Engine(Shards, Protocol):
    """A sharded model in training. Every method is a collective unless it says otherwise: all ranks call it alike."""

    world: World
    model: nn.Module

    def load(self, architecture: Architecture, weights: Weights) -> None:
        """Build the model sharded and fill each rank's shard from `weights`; what was there before is freed. Raises
        UserError where shapes differ."""
        ...

    def build(self, architecture: Architecture) -> None:
        """Build the model sharded, its values undefined; what was there before is freed."""
        ...

    def rebuild(self, architecture: Architecture, factors: Mapping[str, Decomposed]) -> None:
        """Change the structure: the Linears named in `factors` take these, every other parameter keeps its value; the
        optimizer ends."""
        ...

    def start(self, optimizer: Optimizer, steps: int = 0, state: State | None = None) -> None:
        """Begin to train with a fresh optimizer, or with one that has made `steps` steps and holds `state`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`. What is trained on is the mean of the ranks' losses."""
        ...

    def step(self, lr: float, clip: float, refuse: Tensor) -> Tensor:
        """Clip the gradients' global norm to `clip`, step at `lr`, and clear them. Returns the norm before clipping, a
        scalar on the device.

        Where `refuse`, a truth value on the device that all ranks have alike, is true, or the norm is not finite, the
        gradients are cleared and neither the parameters nor the optimizer change.
        """
        ...

    def params(self) -> int:
        """All parameters of the model, tied ones once. Not a collective."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of this rank's shards, in host memory. Not a collective."""
        ...

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put a snapshot of the present structure back. Not a collective."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """Each whole parameter, one at a time, on rank 0 (None elsewhere), by its state-dict name, tied ones once;
        float32, on the CPU."""
        ...

    def state(self) -> dict[str, dict[str, Tensor]]:
        """A copy, in host memory, of what the optimizer keeps: name -> parameter -> this rank's shard; all zero before
        the first step. Not a collective."""
        ...

    def sharded(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same memory as DTensors on the CPU, which say what part of the whole each shard is, without padding:
        `shards`, in host memory, are of parameters of the model, or of what has their names and shapes. Not a
        collective."""
        ...


# Beside `Options` and `open_engine`, an engine's file says whether it has `on_whole`, as WHOLE_MATRICES.
ENGINES = Registry("engine", "engine", settings="Options")


def open_engine(name: str, settings: Any, world: World) -> Engine:
    """The engine `name` over the ranks of `world`."""
    return ENGINES.get(name).open_engine(settings, world)


@contextmanager
def rounded(engine: Engine, dtype: torch.dtype, packed: Iterable[Decomposed] = ()) -> Iterator[None]:
    """Inside, every parameter of `engine` has the value that it takes when published in `dtype`, and those pairs that
    are `packed` stand in the place of their own."""
    instead = {f"{made.name}.{part}.weight": getattr(made, part) for made in packed for part in ("up", "down")}
    if dtype == torch.float32 and not instead:
        yield
        return
    exact = engine.snapshot()
    engine.restore({name: instead.pop(name, tensor).to(dtype) for name, tensor in exact.items()})
    try:
        yield
    finally:
        engine.restore(exact)


def grouped(groups: Mapping[str, Group]) -> list[tuple[Group, list[str]]]:
    """The distinct `groups`, each with the names of its parameters, in the order in which they first occur."""
    found: list[tuple[Group, list[str]]] = []
    for name, group in groups.items():
        members = next((members for other, members in found if other == group), None)
        if members is None:
            found.append((group, members := []))
        members.append(name)
    return found


def check_shape(weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    """Raise UserError where `weights` hold the parameter `name` in another shape than the `shape` of the model. Not a
    collective."""
    if weights.shape(name) != shape:
        raise UserError(
            f"tensor {name} is {tuple(weights.shape(name))}, but config.json makes it {tuple(shape)}: they do not "
            "belong together"
        )


def put_factors(shards: dict[str, Tensor], factors: Mapping[str, Decomposed]) -> None:
    """Turn the `shards` of a model, by parameter name, into those of the model whose Linears in `factors` take these; a
    bias goes with `up`."""
    for name, made in factors.items():
        shards[f"{name}.up.weight"], shards[f"{name}.down.weight"] = made.up, made.down
        if f"{name}.bias" in shards:
            shards[f"{name}.up.bias"] = shards.pop(f"{name}.bias")

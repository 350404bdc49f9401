"""How a model lives on many devices: the protocol that every engine keeps, and the choice of one by name.

One file an engine, named as `engine=NAME`; adding a file (and its YAML in conf/engine/) adds the engine. A leading
underscore marks a part of engines. Nothing outside this package knows which one runs.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plrd_train.compress.contracts import Decomposed, Shards
from plrd_train.errors import UserError
from plrd_train.registry import Registry
from plrd_train.runtime.world import World


class Architecture(Protocol):
    """A model's structure without its weights."""

    def build(self) -> nn.Module:
        """The model, float32, on the current default device (an engine calls it under `torch.device("meta")`)."""
        ...

    def refill(self, model: nn.Module) -> None:
        """Recompute the buffers that no checkpoint holds (rotary frequencies, …) after the model came off the meta
        device."""
        ...


class Weights(Protocol):
    """Where the initial values of the parameters come from, by name."""

    def shape(self, name: str) -> torch.Size: ...

    def read(self, name: str, rows: slice) -> Tensor:
        """The `rows` of the parameter, of any floating dtype, on the CPU."""
        ...


@dataclass(frozen=True)
class AdamW:
    """Settings of the optimizer (Loshchilov and Hutter 2019); weight decay acts on matrices only."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


# What AdamW keeps beside each parameter, in its shape; and such a state: the name of a moment -> parameter -> a rank's
# shard.
MOMENTS = ("exp_avg", "exp_avg_sq")
Moments = Mapping[str, Mapping[str, Tensor]]


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

    def start(self, optimizer: AdamW, steps: int = 0, moments: Moments | None = None) -> None:
        """Begin to train with a fresh optimizer, or with one that has made `steps` steps and stands at `moments`."""
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

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """A copy, in host memory, of the optimizer's state: MOMENTS -> parameter -> this rank's shard; all zero before
        the first step. Not a collective."""
        ...

    def sharded(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same memory as DTensors on the CPU, which say what part of the whole each shard is, without padding: of
        all parameters of the model, or of something of their shape, in host memory. Not a collective."""
        ...


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

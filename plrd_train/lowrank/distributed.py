"""The distributed decomposition: each weight is gathered to the one rank that owns it, factored there, and its factors go back as shards.

Owner-computes, in rounds: weights sorted by cost are dealt one a rank a round, so that the ranks of a round work on weights of about the same cost,
and every rank runs the same collectives in the same order. No rank ever holds more than one whole weight.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from plrd_train.lowrank.factorizers import Factorizer
from plrd_train.lowrank.ranks import Shape
from plrd_train.lowrank.truncate import Factors


class Shards(Protocol):
    """What an engine offers to the decomposition. `gather` and `scatter` are collectives: all ranks call them alike, in the same order."""

    rank: int
    world_size: int
    device: torch.device

    def gather(self, name: str, owner: int) -> Tensor | None:
        """The whole float32 parameter `name` on rank `owner`, None on the others."""
        ...

    def scatter(self, tensor: Tensor | None, shape: tuple[int, ...], owner: int) -> Tensor:
        """This rank's shard, as this engine shards a parameter of that shape, of the float32 `tensor` that rank `owner` holds."""
        ...

    def share(self, value: object) -> list:
        """The small picklable `value` of every rank, in rank order, on every rank. A collective."""
        ...


@dataclass(frozen=True)
class Decomposed:
    """The factors of one Linear: this rank's shards of `up` (out, rank) and `down` (rank, in), the same error and time on every rank."""

    name: str
    rank: int
    up: Tensor = field(repr=False)
    down: Tensor = field(repr=False)
    rel_error: float
    seconds: float


class DecompositionError(ValueError):
    """A weight that cannot be factored; the message names it."""


def changes(shapes: Mapping[str, Shape], ranks: Mapping[str, int]) -> dict[str, int]:
    """The part of `ranks` that is no rank a Linear has already: what there is to factor."""
    return {name: rank for name, rank in ranks.items() if shapes[name].rank != rank}


def rounds(shapes: Mapping[str, Shape], ranks: Mapping[str, int], world_size: int) -> Iterator[list[str]]:
    """Deal the Linears named in `ranks` into rounds: the i-th name of a round belongs to rank i. Costliest first; within a cost, the model's
    order."""
    names = sorted(ranks, key=lambda name: -cost(shapes[name]))
    for start in range(0, len(names), world_size):
        yield names[start : start + world_size]


def cost(shape: Shape) -> float:
    """Floating-point operations of factoring, up to a constant: Gram matrix and eigenvectors of the smaller side, or QR and core of a product."""
    small, large = sorted((shape.out_features, shape.in_features))
    if shape.rank is None:
        return small * small * large + 10.0 * small**3
    return shape.rank**2 * (small + large) + 10.0 * shape.rank**3


def decompose(
    engine: Shards,
    shapes: Mapping[str, Shape],
    ranks: Mapping[str, int],
    factorizer: Factorizer,
    on_done: Callable[[Decomposed], None] = lambda done: None,
) -> dict[str, Decomposed]:
    """Factor every Linear named in `ranks` to that rank over the live sharded model, which is left as it is.

    `shapes` says what each Linear is now. Returns the new factors as shards, and calls `on_done` for each Linear on every rank.
    Raises DecompositionError, on every rank alike, where a weight holds NaN or Inf.
    """
    done: dict[str, Decomposed] = {}
    for dealt in rounds(shapes, ranks, engine.world_size):
        own: list[Tensor] = []
        for owner, name in enumerate(dealt):
            parts = ("weight",) if shapes[name].rank is None else ("up.weight", "down.weight")
            whole = [engine.gather(f"{name}.{part}", owner) for part in parts]
            if owner == engine.rank:
                own = [tensor for tensor in whole if tensor is not None]
        factors, seconds, failure = None, 0.0, None
        if own:
            name = dealt[engine.rank]
            start = time.perf_counter()
            try:
                factors = factorizer.dense(own[0], ranks[name]) if len(own) == 1 else factorizer.product(own[0], own[1], ranks[name])
            except ValueError as error:
                failure = f"{name}: {error}"
            seconds = time.perf_counter() - start
        reports = engine.share((failure, factors.rel_error if factors else 0.0, seconds))
        for failed, _, _ in reports:
            if failed:
                raise DecompositionError(failed)
        for owner, name in enumerate(dealt):
            done[name] = _scatter(engine, name, shapes[name], ranks[name], factors if owner == engine.rank else None, owner, reports[owner])
            on_done(done[name])
    return done


def _scatter(engine: Shards, name: str, shape: Shape, rank: int, factors: Factors | None, owner: int, report: tuple) -> Decomposed:
    up = engine.scatter(factors.up if factors else None, (shape.out_features, rank), owner)
    down = engine.scatter(factors.down if factors else None, (rank, shape.in_features), owner)
    return Decomposed(name, rank, up, down, rel_error=report[1], seconds=report[2])

"""A block of a walk, decomposed in order: each Linear is factored on the inputs that the Linears before it give once
they are factored.

Every rank holds the whole block (`plrd_train.compress.blocks`) and its own part of the text. Those Linears that share
an input are a step: their statistic is added up over the ranks and goes to the owners, which factor one of them each
and hand the factors to all. `factor_block` is all there is to a method without more to it (`rom`); the others make
their own of its parts. `plrd_train.compress.finished` takes one block after the other.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plrd_train.compress.algebra.truncate import Factors, Spectral
from plrd_train.compress.collect import Sum, distinct_inputs, hooked
from plrd_train.compress.contracts import Block, Decomposed, DecompositionError, Shards
from plrd_train.compress.linear import LowRankLinear
from plrd_train.compress.methods import Factorizer
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import agreed, everywhere, owners
from plrd_train.compress.statistics import STATISTICS, Statistic
from plrd_train.compress.surgery import replace_linears


def factor_block(
    engine: Shards, block: Block, shapes: Mapping[str, Shape], ranks: Mapping[str, int], factorizer: Factorizer
) -> dict[str, "Made"]:
    """Factor the Linears of the block that are named in `ranks`, each on what those before it give once they are
    factored. A collective."""
    made: dict[str, Made] = {}
    for step in steps(engine, block, inside(block, ranks)):
        statistic = _statistic(engine, block, step, STATISTICS.get(str(factorizer.statistic)), shapes)
        made |= factor(engine, block, step, shapes, ranks, partial(decomposed, factorizer, statistic=statistic))
        del statistic  # before the next one comes, or the block runs
    return made


@torch.no_grad()
def collect_in_order(
    engine: Shards, blocks: Iterable[Block], kind: Statistic, shapes: Mapping[str, Shape], names: Collection[str]
) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """What `plrd_train.compress.collect.collect` yields, by a walk: for a model of which one block is in memory at
    a time, and inputs alone.

    The Linears of a block that share an input come together. The blocks are left as they are. Raises DecompositionError
    as `plrd_train.compress.finished.block_by_block` does.
    """
    left = set(names)
    for block in blocks:
        for step in steps(engine, block, inside(block, names)):
            statistic = _statistic(engine, block, step, kind, shapes)
            owner = owners(shapes, step.names, engine.world_size)
            left -= set(step.names)
            yield (
                step.names,
                {} if statistic is None else {name: statistic for name in step.names if owner[name] == engine.rank},
            )
    refuse(left)


def _statistic(
    engine: Shards, block: Block, step: "Step", kind: Statistic, shapes: Mapping[str, Shape]
) -> Tensor | None:
    """What the text tells of the input of the step's Linears, on their owners. A collective."""
    one = Sum(kind, torch.zeros(kind.size(shapes[step.names[0]]), device=engine.device))
    for batch in range(len(block.inputs)):
        one.add(given(block, step.linears[0], batch))
    return one.mean(engine, counted(engine, step, one.count), step.owners(shapes, engine.world_size))


@dataclass(frozen=True)
class Step:
    """Linears of a block that are given the same tensor, by their names in the block."""

    block: str
    linears: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Their names in the model."""
        return [f"{self.block}.{linear}" for linear in self.linears]

    def owners(self, shapes: Mapping[str, Shape], world_size: int) -> set[int]:
        """The ranks that factor one of them."""
        return set(owners(shapes, self.names, world_size).values())


@dataclass(frozen=True)
class Made:
    """What all ranks know of a Linear that was factored: the rank that did it, in how many seconds, and with which
    errors (`Factors`)."""

    owner: int
    seconds: float
    rel_error: float
    metric_error: float | None


def inside(block: Block, ranks: Collection[str]) -> list[str]:
    """Those Linears of `ranks` that stand in the block, by their names in it."""
    return [name.removeprefix(f"{block.name}.") for name in ranks if name.startswith(f"{block.name}.")]


def steps(engine: Shards, block: Block, linears: Collection[str]) -> list[Step]:
    """The `linears` of the block by what they are given, in the order in which it calls them. A rank without text asks
    the others."""
    own = distinct_inputs(block.module, linears, lambda: block.run(0)) if block.inputs else None
    return [Step(block.name, group) for group in next(found for found in engine.share(own) if found is not None)]


class _ReachedError(Exception):
    """The Linear in question has its input: the rest of the block need not run."""


def given(block: Block, linear: str, batch: int) -> Tensor:
    """What one of the block's Linears, which is called, is given of that batch: (n, length, in)."""
    found: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _ReachedError

    with hooked(block.module, [linear], lambda name: hook), suppress(_ReachedError):
        block.run(batch)
    return found[0]


def counted(engine: Shards, step: Step, count: int) -> int:
    """The tokens of all ranks, `count` of which this one has given to a sum. A collective; raises DecompositionError
    for none."""
    total = sum(engine.share(count))
    if not total:
        raise DecompositionError(f"{step.names[0]}: no token of the calibration text reaches it")
    return total


def factor(
    engine: Shards,
    block: Block,
    step: Step,
    shapes: Mapping[str, Shape],
    ranks: Mapping[str, int],
    decompose: Callable[[nn.Module], Spectral],
) -> dict[str, Made]:
    """Let the owner of each Linear of the step `decompose` it, and put its factors into the block on every rank. A
    collective."""
    owner = owners(shapes, step.names, engine.world_size)
    own: dict[str, Factors] = {}

    def work() -> dict[str, tuple[float, float, float | None]]:
        reports = {}
        for name, linear in zip(step.names, step.linears, strict=True):
            if owner[name] == engine.rank:
                start = time.perf_counter()
                try:
                    own[name] = one = decompose(block.module.get_submodule(linear)).cut(ranks[name])
                except (ValueError, torch.linalg.LinAlgError) as error:
                    raise ValueError(f"{name}: {error}") from error
                reports[name] = (time.perf_counter() - start, one.rel_error, one.metric_error)
        return reports

    told = {name: report for of_rank in agreed(engine, work) for name, report in of_rank.items()}
    put_everywhere(engine, block, shapes, ranks, owner, own)
    return {name: Made(owner[name], *told[name]) for name in step.names}


def shards(engine: Shards, block: Block, name: str, made: Made) -> Decomposed:
    """The factors that stand in the block in the place of the Linear `name`, as shards. A collective."""
    up, down = factors_of(block, name)
    mine = made.owner == engine.rank
    up_shard = engine.scatter(up if mine else None, tuple(up.shape), made.owner)
    down_shard = engine.scatter(down if mine else None, tuple(down.shape), made.owner)
    return Decomposed(name, len(down), up_shard, down_shard, made.rel_error, made.metric_error, made.seconds)


def refuse(left: Collection[str]) -> None:
    """Raise DecompositionError where there are Linears that no block has called."""
    if left:
        raise DecompositionError(
            f"{min(left)}: no block of the model calls it, so that it cannot be factored in order; see linears.exclude"
        )


def decomposed(factorizer: Factorizer, linear: nn.Module, *, statistic: Tensor | None) -> Spectral:
    """A Linear of a block, decomposed by the method."""
    if isinstance(linear, LowRankLinear):
        return factorizer.product(linear.up.weight, linear.down.weight, statistic)
    assert isinstance(linear, nn.Linear)
    return factorizer.dense(linear.weight, statistic)


def factors_of(block: Block, name: str) -> tuple[Tensor, Tensor]:
    """The factors that stand in the block in the place of the Linear `name`: (out, rank) and (rank, in)."""
    linear = block.module.get_submodule(name.removeprefix(f"{block.name}."))
    assert isinstance(linear, LowRankLinear)
    return linear.up.weight.detach(), linear.down.weight.detach()


def put_everywhere(
    engine: Shards,
    block: Block,
    shapes: Mapping[str, Shape],
    ranks: Mapping[str, int],
    owner: Mapping[str, int],
    own: Mapping[str, Factors],
) -> None:
    """Put factors in the place of Linears of the block, whose biases stay, on every rank: those of each name in
    `owner`, which that rank has in `own`. A collective."""
    for name in owner:
        shape, rank, made = shapes[name], ranks[name], own.get(name)
        up = everywhere(engine, made.up if made else None, (shape.out_features, rank), owner[name])
        down = everywhere(engine, made.down if made else None, (rank, shape.in_features), owner[name])
        linear = name.removeprefix(f"{block.name}.")
        old: Any = block.module.get_submodule(linear)
        bias = old.up.bias if isinstance(old, LowRankLinear) else old.bias
        replace_linears(block.module, {linear: rank})
        new: Any = block.module.get_submodule(linear)
        new.set_factors(up, down)
        if bias is not None:
            new.up.bias.copy_(bias)

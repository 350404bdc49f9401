"""The parts that a sequential method is made of: the Linears of one block, step by step.

Every rank holds the whole block (`plrd_train.compress.blocks`) and its own part of the text. The Linears of a block
that receive the same input are a step. The statistic of that input is summed over the ranks and goes to the owners of
the Linears; each owner factors its own, and sends the factors to all ranks. The next step then runs on the block with
these factors in it.
"""

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plrd_train.compress.algebra.truncate import Factors, Spectral
from plrd_train.compress.collect import Sum, distinct_inputs, hooked
from plrd_train.compress.contracts import Block, BlockTask, DecompositionError, FactorReport, Shards
from plrd_train.compress.linear import LowRankLinear
from plrd_train.compress.methods import Method
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import agreed, everywhere, owners
from plrd_train.compress.statistics import STATISTICS, Statistic
from plrd_train.compress.surgery import replace_linears


def factor_by_statistic(task: BlockTask, method: Method) -> dict[str, FactorReport]:
    """Factor the Linears of the block one step after the other: each by the `dense` or `product` of the method, on the
    statistic of its inputs in the block as factored so far. A collective."""
    reports: dict[str, FactorReport] = {}
    for step in steps(task.engine, task.block, task.linears):
        statistic = statistic_of(task.engine, task.block, step, STATISTICS.get(str(method.statistic)), task.shapes)

        def decompose(linear: nn.Module, known: Tensor | None = statistic) -> Spectral:
            if isinstance(linear, LowRankLinear):
                return method.product(linear.up.weight, linear.down.weight, known)
            assert isinstance(linear, nn.Linear)
            return method.dense(linear.weight, known)

        reports |= factor_step(task, step, decompose)
        del statistic, decompose  # before the next statistic is made, or the block runs
    return reports


@dataclass(frozen=True)
class Step:
    """Linears of a block that receive the same tensor, by their names in the block."""

    block: str
    linears: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Their names in the model."""
        return [f"{self.block}.{linear}" for linear in self.linears]

    def owners(self, shapes: Mapping[str, Shape], world_size: int) -> set[int]:
        """The ranks that factor one of them."""
        return set(owners(shapes, self.names, world_size).values())


def steps(engine: Shards, block: Block, linears: Collection[str]) -> list[Step]:
    """The `linears` of the block, grouped by their input, in the order in which the block calls them. A collective, as
    a rank without text cannot run the block."""
    own = distinct_inputs(block.module, linears, lambda: block.run(0)) if block.inputs else None
    return [Step(block.name, group) for group in next(found for found in engine.share(own) if found is not None)]


def statistic_of(
    engine: Shards, block: Block, step: Step, statistic: Statistic, shapes: Mapping[str, Shape]
) -> Tensor | None:
    """The statistic of the input of the step's Linears over the text of all ranks, on their owners; None on the other
    ranks. A collective. Raises DecompositionError where there is no token."""
    one = Sum(statistic, torch.zeros(statistic.size(shapes[step.names[0]]), device=engine.device))
    for batch in range(len(block.inputs)):
        one.add(input_of(block, step.linears[0], batch))
    return one.mean(engine, total_tokens(engine, step, one.count), step.owners(shapes, engine.world_size))


class _ReachedError(Exception):
    """The input of the Linear is known: the rest of the block need not run."""


def input_of(block: Block, linear: str, batch: int) -> Tensor:
    """The input (n, length, in) of one of the block's Linears for that batch."""
    found: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _ReachedError

    with hooked(block.module, [linear], lambda name: hook), suppress(_ReachedError):
        block.run(batch)
    return found[0]


def total_tokens(engine: Shards, step: Step, count: int) -> int:
    """The sum over the ranks of `count`, the tokens that a rank has added to its sum. A collective. Raises
    DecompositionError where it is 0."""
    total: int = sum(engine.share(count))
    if not total:
        raise DecompositionError(f"{step.names[0]}: no token of the calibration text reaches it")
    return total


def factor_step(task: BlockTask, step: Step, decompose: Callable[[nn.Module], Spectral]) -> dict[str, FactorReport]:
    """Let the owner of each Linear of the step decompose it by `decompose`, and put the factors into the block on every
    rank. A collective. Raises DecompositionError, on every rank alike, where a Linear cannot be decomposed."""
    engine, block = task.engine, task.block
    owner = owners(task.shapes, step.names, engine.world_size)
    own: dict[str, Factors] = {}

    def work() -> dict[str, tuple[float, float, float | None]]:
        reports = {}
        for name, linear in zip(step.names, step.linears, strict=True):
            if owner[name] == engine.rank:
                start = time.perf_counter()
                try:
                    own[name] = one = decompose(block.module.get_submodule(linear)).cut(task.ranks[name])
                except (ValueError, torch.linalg.LinAlgError) as error:
                    raise ValueError(f"{name}: {error}") from error
                reports[name] = (time.perf_counter() - start, one.rel_error, one.metric_error)
        return reports

    shared = {name: report for of_rank in agreed(engine, work) for name, report in of_rank.items()}
    put_everywhere(task, owner, own)
    return {name: FactorReport(owner[name], *shared[name]) for name in step.names}


def put_everywhere(task: BlockTask, owner: Mapping[str, int], own: Mapping[str, Factors]) -> None:
    """Replace Linears of the block by factors, on every rank; their biases stay. Of each name in `owner`, that rank has
    the factors in `own`. A collective."""
    block = task.block
    for name in owner:
        shape, rank, factors = task.shapes[name], task.ranks[name], own.get(name)
        up = everywhere(task.engine, factors.up if factors else None, (shape.out_features, rank), owner[name])
        down = everywhere(task.engine, factors.down if factors else None, (rank, shape.in_features), owner[name])
        linear = name.removeprefix(f"{block.name}.")
        old: Any = block.module.get_submodule(linear)
        bias = old.up.bias if isinstance(old, LowRankLinear) else old.bias
        replace_linears(block.module, {linear: rank})
        new: Any = block.module.get_submodule(linear)
        new.set_factors(up, down)
        if bias is not None:
            new.up.bias.copy_(bias)


def pair_of(block: Block, name: str) -> tuple[Tensor, Tensor]:
    """The factors (out, rank) and (rank, in) of the low-rank Linear `name` of the block."""
    linear = block.module.get_submodule(name.removeprefix(f"{block.name}."))
    assert isinstance(linear, LowRankLinear)
    return linear.up.weight.detach(), linear.down.weight.detach()

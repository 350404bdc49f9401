"""The decomposition in order: each Linear is factored on the inputs that the Linears before it give once they are factored.

Block by block (`plrd_train.lowrank.walk`), every rank holding the whole block and its own part of the text. Within a block those Linears that share
an input are a step: their statistic is added up over the ranks and goes to the owners, which factor one of them each and hand the factors to all.
"""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plrd_train.lowrank.calibration import KINDS, Kind, Sum, distinct_inputs, hooked
from plrd_train.lowrank.distributed import Decomposed, DecompositionError, Shards, owners
from plrd_train.lowrank.factorizers import Factorizer
from plrd_train.lowrank.linear import LowRankLinear
from plrd_train.lowrank.ranks import Shape
from plrd_train.lowrank.spectral import Factors, Spectral
from plrd_train.lowrank.surgery import replace_linears
from plrd_train.lowrank.walk import Block


@torch.no_grad()
def decompose_in_order(
    engine: Shards, blocks: Iterable[Block], shapes: Mapping[str, Shape], ranks: Mapping[str, int], factorizer: Factorizer
) -> Iterator[Decomposed]:
    """Factor every Linear named in `ranks` to that rank, in the order in which the model calls them, and yield its factors as shards.

    `blocks` are those of a walk over the weights of `engine`, which is left as it is. A collective at each step of the iteration; otherwise as
    `plrd_train.lowrank.distributed.decompose`. Raises DecompositionError, on every rank alike, also where a Linear stands outside the blocks or no
    text reaches it.
    """
    left = set(ranks)
    for block in blocks:
        inside = [name.removeprefix(f"{block.name}.") for name in ranks if name.startswith(f"{block.name}.")]
        for step in _steps(engine, block, inside):
            for made in _factor(engine, block, step, shapes, ranks, factorizer):
                left.remove(made.name)
                yield made
    if left:
        raise DecompositionError(f"{min(left)}: no block of the model calls it, so that it cannot be factored in order; see linears.exclude")


def _steps(engine: Shards, block: Block, linears: Collection[str]) -> list[tuple[str, ...]]:
    """The `linears` of the block by what they are given, in the order in which it calls them. A rank without text asks the others."""
    own = distinct_inputs(block.module, linears, lambda: block.run(0)) if block.inputs else None
    return next(steps for steps in engine.share(own) if steps is not None)


def _factor(
    engine: Shards, block: Block, step: Sequence[str], shapes: Mapping[str, Shape], ranks: Mapping[str, int], factorizer: Factorizer
) -> Iterator[Decomposed]:
    """Factor the Linears of one step, each on its owner, and put their factors into the block on every rank."""
    names = {f"{block.name}.{linear}": linear for linear in step}
    owner = owners(shapes, names, engine.world_size)
    statistic = _statistic(engine, block, step[0], KINDS[str(factorizer.statistics)], shapes[next(iter(names))], set(owner.values()))
    own: dict[str, Factors] = {}
    seconds: dict[str, float] = {}
    failure = None
    try:
        for name in names:
            if owner[name] == engine.rank:
                start = time.perf_counter()
                own[name] = _decomposed(factorizer, block.module.get_submodule(names[name]), statistic).cut(ranks[name])
                seconds[name] = time.perf_counter() - start
    except ValueError as error:
        failure = f"{name}: {error}"
    reports = engine.share((failure, {name: (made.rel_error, made.metric_error, seconds[name]) for name, made in own.items()}))
    for failed, _ in reports:
        if failed:
            raise DecompositionError(failed)
    told = {name: report for _, of_rank in reports for name, report in of_rank.items()}
    for name, linear in names.items():
        shape, rank, source = shapes[name], ranks[name], owner[name]
        made = own.get(name)
        up = _everywhere(engine, made.up if made else None, (shape.out_features, rank), source)
        down = _everywhere(engine, made.down if made else None, (rank, shape.in_features), source)
        _put(block.module, linear, up, down)
        mine = source == engine.rank
        up_shard = engine.scatter(up if mine else None, (shape.out_features, rank), source)
        down_shard = engine.scatter(down if mine else None, (rank, shape.in_features), source)
        yield Decomposed(name, rank, up_shard, down_shard, *told[name])


class _ReachedError(Exception):
    """The Linear in question has its input: the rest of the block need not run."""


def _statistic(engine: Shards, block: Block, linear: str, kind: type[Kind], shape: Shape, owners: Collection[int]) -> Tensor | None:
    """What the text tells of the input of one of the block's Linears, on the `owners`."""
    one = Sum(kind, torch.zeros(kind.size(shape), device=engine.device))

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        one.add(given[0])
        raise _ReachedError

    with hooked(block.module, [linear], lambda name: hook):
        for batch in range(len(block.inputs)):
            with suppress(_ReachedError):
                block.run(batch)
    count = sum(engine.share(one.count))
    if not count:
        raise DecompositionError(f"{block.name}.{linear}: no token of the calibration text reaches it")
    return one.mean(engine, count, owners)


def _decomposed(factorizer: Factorizer, linear: nn.Module, statistic: Tensor | None) -> Spectral:
    if isinstance(linear, LowRankLinear):
        return factorizer.product(linear.up.weight, linear.down.weight, statistic)
    assert isinstance(linear, nn.Linear)
    return factorizer.dense(linear.weight, statistic)


def _everywhere(engine: Shards, tensor: Tensor | None, shape: tuple[int, ...], owner: int) -> Tensor:
    """The `tensor` that the owner holds, on every rank."""
    whole = torch.empty(shape, device=engine.device) if tensor is None else tensor
    if engine.world_size > 1:
        dist.broadcast(whole, src=owner)
    return whole


def _put(block: nn.Module, linear: str, up: Tensor, down: Tensor) -> None:
    """Put the factors in the place of a Linear of the block; its bias stays."""
    old: Any = block.get_submodule(linear)
    bias = old.up.bias if isinstance(old, LowRankLinear) else old.bias
    replace_linears(block, {linear: len(down)})
    new: Any = block.get_submodule(linear)
    new.set_factors(up, down)
    if bias is not None:
        new.up.bias.copy_(bias)

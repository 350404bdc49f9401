"""Walks through a model, one block in memory at a time: a sequential method at work, and statistics of the inputs."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from plrd_train.compress.block_cache import BlockCache
from plrd_train.compress.contracts import (
    Block,
    BlockTask,
    Cache,
    Decomposed,
    DecompositionError,
    FactorReport,
    Shards,
)
from plrd_train.compress.methods import SequentialMethod
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import owners
from plrd_train.compress.statistics import Statistic
from plrd_train.compress.steps import pair_of, statistic_of, steps


@torch.no_grad()
def factor_in_order(
    engine: Shards,
    walk: Callable[[], Iterator[Block]],
    shapes: Mapping[str, Shape],
    ranks: Mapping[str, int],
    method: SequentialMethod,
    cache: Cache | None = None,
) -> Iterator[Decomposed]:
    """Factor every Linear named in `ranks` to that rank by the method, and yield its factors as shards.

    Each call of `walk` begins a walk over all blocks of the model, with the weights of `engine`, which is left
    unchanged, and all of the calibration text. A block that is in `cache` is restored, and not factored again. Each
    step of the iteration is a collective. Raises DecompositionError, on every rank alike, as
    `plrd_train.compress.rounds.decompose` does, and where no block calls a Linear or no text reaches it.
    """
    blocks, missing = BlockCache(engine, shapes, ranks, method, cache), set(ranks)
    originals = walk() if method.keeps_original else None
    for block in walk():
        task = BlockTask(engine, block, next(originals) if originals else None, shapes, ranks)
        reports = blocks.restore(task)
        if reports is None:
            reports = method.factor_block(task)
            blocks.put(task, reports)
        for name, report in reports.items():
            missing.remove(name)
            yield _sharded(engine, block, name, report)
    _refuse(missing)


@torch.no_grad()
def collect_in_order(
    engine: Shards,
    blocks: Iterable[Block],
    statistic: Statistic,
    shapes: Mapping[str, Shape],
    names: Collection[str],
) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """As `plrd_train.compress.collect.collect`, by a walk over `blocks`, with one of them in memory at a time; for a
    statistic that uses no gradients.

    The Linears of one step come together. The blocks are left unchanged. Raises DecompositionError as `factor_in_order`
    does.
    """
    missing, ranks = set(names), dict.fromkeys(names, 0)
    for block in blocks:
        for step in steps(engine, block, BlockTask(engine, block, None, shapes, ranks).linears):
            found = statistic_of(engine, block, step, statistic, shapes)
            owner = owners(shapes, step.names, engine.world_size)
            missing -= set(step.names)
            yield step.names, {} if found is None else {n: found for n in step.names if owner[n] == engine.rank}
    _refuse(missing)


def _sharded(engine: Shards, block: Block, name: str, report: FactorReport) -> Decomposed:
    """The factors of the low-rank Linear `name` of the block, as shards. A collective."""
    up, down = pair_of(block, name)
    mine = report.owner == engine.rank
    up_shard = engine.scatter(up if mine else None, tuple(up.shape), report.owner)
    down_shard = engine.scatter(down if mine else None, tuple(down.shape), report.owner)
    return Decomposed(name, len(down), up_shard, down_shard, report.rel_error, report.metric_error, report.seconds)


def _refuse(missing: Collection[str]) -> None:
    """Raise DecompositionError where a Linear was called by no block."""
    if missing:
        raise DecompositionError(
            f"{min(missing)}: no block of the model calls it, so that it cannot be factored in order; see "
            "linears.exclude"
        )

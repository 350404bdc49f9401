"""Memory of factoring, the first step of a stage, on the rank that needs the most."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import changes, rounds
from plrd_train.compress.statistics import STATISTICS
from plrd_train.config.schema import Config
from plrd_train.plan.calibration import Text, Walk
from plrd_train.plan.replay import peak
from plrd_train.structure import Parts, Structure, add

# A phase, the moment of its peak, and the bytes on the device and on the host.
Held = tuple[str, str, Parts, Parts]


def factoring(
    config: Config,
    memory: Any,
    before: Structure,
    shapes: Mapping[str, Shape],
    ranks: Mapping[str, int],
    text: Text,
    world_size: int,
) -> Iterator[Held]:
    """Yield the memory in addition to the model `before` while its Linears are factored from `shapes` to `ranks`.

    The phases are in the order of `plrd_train.compress.compressor`.
    """
    method, todo, needs = config.factorizer.settings, changes(shapes, ranks), config.compressor().needs()
    if not todo:
        return
    pair = max(_pair(shapes[name], rank) for name, rank in todo.items())
    if needs.spectra:
        own = [[_decomposed(method, shape) for shape in owned] for owned in _owned(shapes, shapes, world_size)]
        waiting = {"factorization": max(map(sum, own))}
        yield from _parted(memory, method, before, shapes, shapes, {}, text, world_size, waiting)
        if text.measuring:
            parts, when = peak(text.measuring, memory.holder(before, text.measuring))
            yield "measure", when, add(parts, {"factorization": pair}), waiting
        if not needs.in_order:
            yield "cut", "", {"factorization": factors(memory, shapes, todo) + max(map(max, own)) + pair}, waiting
    if text.walk:
        yield "factor", "", {"factorization": _in_order(memory, method, before, shapes, todo, text.walk)}, {}
    elif not needs.spectra:
        yield from _parted(memory, method, before, shapes, todo, todo, text, world_size, {})


def factors(memory: Any, shapes: Mapping[str, Shape], ranks: Mapping[str, int]) -> float:
    """Bytes of the first rank's shards of the factors with these ranks."""
    pairs = ((shapes[name], rank) for name, rank in ranks.items())
    return sum(
        4.0 * memory.shard(factor)
        for shape, rank in pairs
        for factor in ((shape.out_features, rank), (rank, shape.in_features))
    )


def _parted(
    memory: Any,
    method: Any,
    before: Structure,
    shapes: Mapping[str, Shape],
    names: Collection[str],
    ranks: Mapping[str, int],
    text: Text,
    world_size: int,
    waiting: Parts,
) -> Iterator[Held]:
    """The Linears `names` are decomposed window by window and truncated to `ranks`.

    The last window has the highest peak. `waiting` is held on the host meanwhile.
    """
    window = text.window
    part = window.names if window else tuple(names)
    done = factors(memory, shapes, ranks)
    earlier = done - factors(memory, shapes, {name: ranks[name] for name in part if name in ranks})
    if window:
        parts, when = peak(window.events, memory.holder(before, window.events))
        yield "calibrate", when, add(parts, {"factorization": earlier + window.sums}), waiting
    highest = earlier + in_rounds(
        memory, method, shapes, part, ranks, world_size, window.owns if window else [0] * world_size
    )
    yield "factor", "", {"factorization": max(highest, done)}, waiting


def in_rounds(
    memory: Any,
    method: Any,
    shapes: Mapping[str, Shape],
    names: Collection[str],
    ranks: Mapping[str, int],
    world_size: int,
    statistics: Sequence[float],
) -> float:
    """Peak bytes of the rounds of decomposition.

    A rank holds the weight that it decomposes, the working memory of that, the next weight, which arrives meanwhile,
    the finished factors, and its `statistics`. The method's `peak_bytes` already includes the statistic in use.
    """
    added = [
        factors(memory, shapes, {name: ranks[name] for name in part if name in ranks})
        for part in rounds(shapes, names, world_size)
    ]
    highest = 0.0
    for own, known in zip(_owned(shapes, names, world_size), statistics, strict=False):
        for shape, following, done in zip(
            own, [*map(_weight, own[1:]), 0.0], accumulate(added, initial=0.0), strict=False
        ):
            working = method.peak_bytes(shape) - _statistic(method, shape) + following
            highest = max(highest, known + done + _weight(shape) + max(_weight(shape), working))
    return highest


def _owned(shapes: Mapping[str, Shape], names: Collection[str], world_size: int) -> list[list[Shape]]:
    """For each rank that owns a Linear, the shapes of its Linears, round by round."""
    dealt = list(rounds(shapes, names, world_size))
    return [[shapes[part[owner]] for part in dealt if owner < len(part)] for owner in range(len(dealt[0]))]


def _in_order(
    memory: Any, method: Any, before: Structure, shapes: Mapping[str, Shape], ranks: Mapping[str, int], walk: Walk
) -> float:
    """Peak bytes of factoring block by block.

    A rank holds a whole block, the hidden states of its text, and the working memory of one Linear. Before that, it
    holds the embeddings twice: as received, and assembled. Some methods also keep the original
    block.
    """
    sizes = Counter[str]()
    for parameter in before.parameters:
        sizes[parameter.block] += 4 * parameter.numel
    blocks = max(len(sizes) - 1, 1)
    block, outside = (
        max(size for name, size in sizes.items() if name),
        max(4 * p.numel for p in before.parameters if not p.block),
    )
    pairs = {name: _pair(shapes[name], rank) for name, rank in ranks.items()}
    one = max(
        max(method.peak_bytes(shapes[name]), _statistic(method, shapes[name]) + walk.runs) for name in ranks
    ) + max(pairs.values())
    highest = max((2 if method.keeps_original else 1) * (block + walk.states) + one, 2 * outside + walk.states)
    if method.trains_blocks:
        # A copy of the factors to restore, gradients and two moments; the hidden states before and after the block.
        highest = max(highest, block + 5 * sum(pairs.values()) / blocks + 3 * walk.states + walk.keeps)
    done = factors(memory, shapes, ranks)
    return max(done * (1 - 1 / blocks) + highest, done)


def _decomposed(method: Any, shape: Shape) -> float:
    """Bytes of a decomposed weight: the weight, the metric (the size of the statistic), and the singular vectors."""
    return (
        _weight(shape)
        + _statistic(method, shape)
        + 4 * min(shape.out_features, shape.in_features, shape.rank or math.inf) ** 2
    )


def _weight(shape: Shape) -> float:
    return 4.0 * shape.pair_params(shape.rank)


def _pair(shape: Shape, rank: int) -> float:
    return 4.0 * shape.pair_params(rank)


def _statistic(method: Any, shape: Shape) -> float:
    return 4.0 * math.prod(STATISTICS.get(method.statistic).size(shape)) if method.statistic else 0.0

"""The distributed decomposition: each weight is gathered to the one rank that owns it and factored there, and its
factors are scattered as shards.

The owner computes, in rounds. The weights are sorted by cost and dealt out, one for each rank and round, so that the
ranks work on weights of about the same cost, and run the same collectives in the same order. The weights of the next
round are gathered while those of the present round are factored, so that a rank holds two whole Linears at most.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plrd_train.compress.algebra.truncate import Factors
from plrd_train.compress.contracts import Cache, Decomposed, DecompositionError, Shards
from plrd_train.compress.methods import Method
from plrd_train.compress.ranks import Shape
from plrd_train.compress.weight import Weight

NONE: Mapping[str, Tensor] = MappingProxyType({})
# Raised by a weight that cannot be factored, and by a cache that cannot be written.
_FAILURES = (ValueError, OSError, torch.linalg.LinAlgError)


def everywhere(engine: Shards, tensor: Tensor | None, shape: tuple[int, ...], owner: int) -> Tensor:
    """The float32 `tensor` of that shape, which rank `owner` holds, on every rank. A collective."""
    whole = torch.empty(shape, device=engine.device) if tensor is None else tensor.contiguous()
    if engine.world_size > 1:
        dist.broadcast(whole, src=owner)
    return whole


def agreed(engine: Shards, work: Callable[[], Any]) -> list[Any]:
    """The results of `work` on every rank, in rank order. A collective. Raises DecompositionError, on every rank alike,
    where it fails on one of them."""
    try:
        value, failure = work(), None
    except _FAILURES as error:
        value, failure = None, str(error)
    return _settled(engine, value, failure)


def _settled(engine: Shards, value: Any, failure: str | None) -> list[Any]:
    """The `value` of every rank, in rank order. A collective. Raises DecompositionError, on every rank alike, where one
    of them has a `failure`."""
    reports = engine.share((value, failure))
    for _, failed in reports:
        if failed:
            raise DecompositionError(failed)
    return [value for value, _ in reports]


def changes(shapes: Mapping[str, Shape], ranks: Mapping[str, int]) -> dict[str, int]:
    """The entries of `ranks` that differ from the present rank: the Linears that must be factored."""
    return {name: rank for name, rank in ranks.items() if shapes[name].rank != rank}


def rounds(shapes: Mapping[str, Shape], names: Collection[str], world_size: int) -> Iterator[list[str]]:
    """Deal the Linears `names` into rounds: the i-th name of a round belongs to rank i. The costliest come first;
    Linears of equal cost stay in the order of `names`."""
    dealt = sorted(names, key=lambda name: -cost(shapes[name]))
    for start in range(0, len(dealt), world_size):
        yield dealt[start : start + world_size]


def owners(shapes: Mapping[str, Shape], names: Collection[str], world_size: int) -> dict[str, int]:
    """The rank that factors each of the Linears `names`; it needs their statistics."""
    return {name: owner for dealt in rounds(shapes, names, world_size) for owner, name in enumerate(dealt)}


def cost(shape: Shape) -> float:
    """The multiplications that factoring takes, up to a constant: the Gram matrix and the eigenvectors of the smaller
    side, and two tall products. For a product of factors, those of its core."""
    small, large = sorted((shape.out_features, shape.in_features))
    if shape.rank is None:
        return small * small * large + 10.0 * small**3
    return shape.rank**2 * (small + large) + 10.0 * shape.rank**3


def decompose(
    engine: Shards,
    shapes: Mapping[str, Shape],
    ranks: Mapping[str, int],
    method: Method,
    statistics: Mapping[str, Tensor] = NONE,
    cache: Cache | None = None,
) -> Iterator[Decomposed]:
    """Factor every Linear named in `ranks` to that rank, and yield its factors as shards. The sharded model is left
    unchanged.

    `shapes` are the present shapes of the Linears. `statistics` are those of the Linears that this rank owns
    (`owners`), where the method needs them. Factors that are in `cache` are read, and not computed again. Each step of
    the iteration is a collective. Raises DecompositionError, on every rank alike, where a weight holds NaN or Inf, or
    the cache cannot be written.
    """

    def work(name: str, parts: list[Tensor]) -> Factors:
        return Weight(name, parts, statistics.get(name), method, cache).cut(ranks[name])

    dealt = [dict(enumerate(names)) for names in rounds(shapes, ranks, engine.world_size)]
    for names, factors, reports in _in_rounds(engine, dealt, work, _report, shapes):
        yield from _scattered(engine, shapes, ranks, names, factors, reports)


class Spectra:
    """As `decompose`, in two phases, for ranks that depend on the spectra: `add` decomposes Linears, `cut` factors
    them. A decomposition stays on its owner, in host memory: that of an m x n weight takes about 4 (m n + min(m, n)^2)
    bytes."""

    def __init__(self, engine: Shards, shapes: Mapping[str, Shape], method: Method, cache: Cache | None = None):
        self.values: dict[str, Tensor] = {}
        """The singular values of each Linear added so far (`Spectral.values`), on every rank."""
        self._engine, self._shapes, self._method, self._cache = engine, shapes, method, cache
        self._own: dict[str, Weight] = {}
        self._owners: dict[str, int] = {}

    def add(
        self,
        names: Collection[str],
        statistics: Mapping[str, Tensor] = NONE,
        on_done: Callable[[str], object] = lambda name: None,
    ) -> None:
        """Decompose the Linears `names`, and call `on_done` for each; otherwise as `decompose`. A collective."""

        def work(name: str, parts: list[Tensor]) -> Tensor:
            self._own[name] = weight = Weight(name, parts, statistics.get(name), self._method, self._cache)
            values = weight.values()
            weight.to_host()
            return values

        dealt = [dict(enumerate(part)) for part in rounds(self._shapes, names, self._engine.world_size)]
        for owned, _, reports in _in_rounds(self._engine, dealt, work, lambda values: values, self._shapes):
            self._owners.update((name, owner) for owner, name in owned.items())
            for owner, name in owned.items():
                self.values[name] = reports[owner].value
                on_done(name)

    def whole(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """The factors (out, rank) and (rank, in) of a Linear that was added, whole on every rank; they are not cached.
        A collective."""
        shape, owner = self._shapes[name], self._owners[name]
        work = {owner: name}
        cut = _in_rounds(
            self._engine,
            [work],
            lambda name, _: self._own[name].decomposed(self._engine.device).cut(rank),
            lambda made: None,
        )
        made = next(cut)[1]
        up = everywhere(self._engine, made.up if made else None, (shape.out_features, rank), owner)
        return up, everywhere(self._engine, made.down if made else None, (rank, shape.in_features), owner)

    def cut(self, ranks: Mapping[str, int]) -> Iterator[Decomposed]:
        """Factor every Linear named in `ranks`, all of which were added, to that rank; otherwise as `decompose`. It may
        be called several times."""

        def work(name: str, parts: list[Tensor]) -> Factors:
            return self._own[name].cut(ranks[name], self._engine.device)

        queues = [[name for name in ranks if self._owners[name] == owner] for owner in range(self._engine.world_size)]
        dealt = [
            {owner: name for owner, name in enumerate(names) if name is not None} for names in zip_longest(*queues)
        ]
        for names, factors, reports in _in_rounds(self._engine, dealt, work, _report):
            yield from _scattered(self._engine, self._shapes, ranks, names, factors, reports)


@dataclass(frozen=True)
class _Report:
    """The work of one rank in a round, as all ranks know it."""

    value: Any
    seconds: float


def _in_rounds(
    engine: Shards,
    dealt: Sequence[Mapping[int, str]],
    work: Callable[[str, list[Tensor]], Any],
    summary: Callable[[Any], Any],
    shapes: Mapping[str, Shape] | None = None,
) -> Iterator[tuple[Mapping[int, str], Any, list[_Report]]]:
    """Do `work` for each round (owner -> name) on the owners. With `shapes`, it is given the gathered parameters of the
    Linear. Yields the round, the result of this rank, and the reports of all ranks, which hold `summary` of their
    results."""

    def gather(names: Mapping[int, str]) -> Callable[[], list[Tensor]]:
        ends = [
            engine.gather(f"{name}.{part}", owner) for owner, name in names.items() for part in _parts(shapes, name)
        ]
        return lambda: [whole for end in ends if (whole := end()) is not None]

    coming = gather(dealt[0]) if dealt else list
    for i, names in enumerate(dealt):
        parts = coming()
        coming = gather(dealt[i + 1]) if i + 1 < len(dealt) else list
        result, report, failure = None, _Report(None, 0.0), None
        if engine.rank in names:
            start = time.perf_counter()
            try:
                result = work(names[engine.rank], parts)
                report = _Report(summary(result), time.perf_counter() - start)
            except _FAILURES as error:
                failure = f"{names[engine.rank]}: {error}"
        del parts
        try:
            reports = _settled(engine, report, failure)
        except DecompositionError:
            coming()  # a gather that has begun must end before other collectives
            raise
        yield names, result, reports


def _parts(shapes: Mapping[str, Shape] | None, name: str) -> tuple[str, ...]:
    if shapes is None:
        return ()
    return ("weight",) if shapes[name].rank is None else ("up.weight", "down.weight")


def _report(factors: Factors) -> tuple[float, float | None]:
    return factors.rel_error, factors.metric_error


def _scattered(
    engine: Shards,
    shapes: Mapping[str, Shape],
    ranks: Mapping[str, int],
    names: Mapping[int, str],
    own: Factors | None,
    reports: list[_Report],
) -> Iterator[Decomposed]:
    """The factors of a round as shards; `own` are the factors that this rank has made."""
    for owner, name in names.items():
        shape, rank, factors = shapes[name], ranks[name], own if owner == engine.rank else None
        up = engine.scatter(factors.up if factors else None, (shape.out_features, rank), owner)
        down = engine.scatter(factors.down if factors else None, (rank, shape.in_features), owner)
        rel_error, metric_error = reports[owner].value
        yield Decomposed(name, rank, up, down, rel_error, metric_error, reports[owner].seconds)

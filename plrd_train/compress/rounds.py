"""The distributed decomposition: each weight is gathered to the one rank that owns it, factored there, and its factors
go back as shards.

Owner-computes, in rounds: weights sorted by cost are dealt one a rank a round, so that the ranks of a round work on
weights of about the same cost, and every rank runs the same collectives in the same order. The weights of the next
round are gathered while those of the present one are factored, so that a rank holds two whole Linears, and never more.
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
# What a weight that cannot be factored, and a folder in which factors cannot be kept, raise.
_FAILURES = (ValueError, OSError, torch.linalg.LinAlgError)


def everywhere(engine: Shards, tensor: Tensor | None, shape: tuple[int, ...], owner: int) -> Tensor:
    """The float32 `tensor` that the owner holds, on every rank. A collective."""
    whole = torch.empty(shape, device=engine.device) if tensor is None else tensor.contiguous()
    if engine.world_size > 1:
        dist.broadcast(whole, src=owner)
    return whole


def agreed(engine: Shards, work: Callable[[], Any]) -> list[Any]:
    """What `work` gives on every rank, in rank order. A collective; raises DecompositionError, on every rank alike,
    where it fails on one."""
    try:
        value, failure = work(), None
    except _FAILURES as error:
        value, failure = None, str(error)
    return _settled(engine, value, failure)


def _settled(engine: Shards, value: Any, failure: str | None) -> list[Any]:
    """The `value` of every rank, in rank order. A collective; raises DecompositionError, on every rank alike, where one
    has a `failure`."""
    reports = engine.share((value, failure))
    for _, failed in reports:
        if failed:
            raise DecompositionError(failed)
    return [value for value, _ in reports]


def changes(shapes: Mapping[str, Shape], ranks: Mapping[str, int]) -> dict[str, int]:
    """Entries of `ranks` that differ from the current rank: what there is to factor."""
    return {name: rank for name, rank in ranks.items() if shapes[name].rank != rank}


def rounds(shapes: Mapping[str, Shape], names: Collection[str], world_size: int) -> Iterator[list[str]]:
    """Deal the Linears `names` into rounds: the i-th name of a round belongs to rank i. Costliest first; within a cost,
    in the order of `names`."""
    dealt = sorted(names, key=lambda name: -cost(shapes[name]))
    for start in range(0, len(dealt), world_size):
        yield dealt[start : start + world_size]


def owners(shapes: Mapping[str, Shape], names: Collection[str], world_size: int) -> dict[str, int]:
    """The rank that factors each of the Linears `names`, and needs its statistic."""
    return {name: owner for dealt in rounds(shapes, names, world_size) for owner, name in enumerate(dealt)}


def cost(shape: Shape) -> float:
    """What factoring takes, up to a constant: Gram matrix and eigenvectors of the smaller side, and two tall products;
    of a product the same of its core."""
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
    """Factor every Linear named in `ranks` to that rank over the live sharded model, which is left as it is.

    `shapes` says what each Linear is now; `statistics` holds those that the method needs, of the Linears that this rank
    owns (`owners`); what is in `kept` already is not factored again. Yields the new factors as shards; each step is a
    collective. Raises DecompositionError, on every rank alike, where a weight holds NaN or Inf, or `kept` cannot be
    written.
    """

    def work(name: str, parts: list[Tensor]) -> Factors:
        return Weight(name, parts, statistics.get(name), method, cache).cut(ranks[name])

    dealt = [dict(enumerate(names)) for names in rounds(shapes, ranks, engine.world_size)]
    for names, factors, reports in _in_rounds(engine, dealt, work, _report, shapes):
        yield from _scattered(engine, shapes, ranks, names, factors, reports)


class Spectra:
    """The same in two phases, for ranks that depend on the spectra: `add` decomposes, `cut` factors. What is decomposed
    stays with its owner, in host memory: a weight of m x n takes about m n + min(m, n)^2 numbers of 4 bytes."""

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
        """Decompose the Linears `names`; otherwise as `decompose`."""

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
        """The factors (out, rank) and (rank, in) of a Linear that was added, at that rank, on every rank; nothing is
        kept. A collective."""
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
        """Factor every Linear named in `ranks`, each of which was added, to that rank; as `decompose`. It can be called
        again."""

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
    """What all are to know of the work of one rank."""

    value: Any
    seconds: float


def _in_rounds(
    engine: Shards,
    dealt: Sequence[Mapping[int, str]],
    work: Callable[[str, list[Tensor]], Any],
    told: Callable[[Any], Any],
    shapes: Mapping[str, Shape] | None = None,
) -> Iterator[tuple[Mapping[int, str], Any, list[_Report]]]:
    """For each round (owner -> name) do `work` on the owners, on the gathered parts of the Linear where there are
    `shapes`. Yields the round, this rank's own result, and the reports of all ranks, with what is `told` of their
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
                report = _Report(told(result), time.perf_counter() - start)
            except _FAILURES as error:
                failure = f"{names[engine.rank]}: {error}"
        del parts
        try:
            reports = _settled(engine, report, failure)
        except DecompositionError:
            coming()  # what has begun must end before anything else does
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
    """The factors of a round, of which `own` are this rank's, as shards."""
    for owner, name in names.items():
        shape, rank, factors = shapes[name], ranks[name], own if owner == engine.rank else None
        up = engine.scatter(factors.up if factors else None, (shape.out_features, rank), owner)
        down = engine.scatter(factors.down if factors else None, (rank, shape.in_features), owner)
        rel_error, metric_error = reports[owner].value
        yield Decomposed(name, rank, up, down, rel_error, metric_error, reports[owner].seconds)

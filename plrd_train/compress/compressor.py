"""The decision how a model is compressed, once: what is looked at, in which order, and what comes of it.

The main job, `plrd factor` and the plan ask the same `Compressor`. They differ in the `Source` that it reads from: a
live sharded model, or a checkpoint of which one block is in memory at a time.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor

from plrd_train.compress.allocations import Allocation, Measuring
from plrd_train.compress.allocations.uniform import Allocation as Uniform
from plrd_train.compress.blocks import gathered, walk
from plrd_train.compress.collect import collect
from plrd_train.compress.contracts import AllocationError, Architecture, Block, Cache, Decomposed, Live, Shards
from plrd_train.compress.losses import measure
from plrd_train.compress.methods import Method, SequentialMethod
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import NONE, Spectra, changes, decompose
from plrd_train.compress.sequential import collect_in_order, factor_in_order
from plrd_train.compress.statistics import STATISTICS

Ranks = dict[str, int]


def _silent(title: str, total: int) -> AbstractContextManager[Callable[[], object]]:
    return nullcontext(lambda: None)


@dataclass(frozen=True)
class Needs:
    """What compression by a method and an allocation looks at before it factors, in this order.

    spectra: all Linears are decomposed first, since the ranks depend on it. statistics: the kind that is collected for
    that, or for the factors of a method that takes each Linear by itself. losses: each Linear alone is measured.
    in_order: the method walks through the blocks.
    """

    spectra: bool
    statistic: str | None
    losses: bool
    in_order: bool

    @property
    def text(self) -> bool:
        """Whether calibration text is read at all."""
        return self.statistic is not None or self.losses or self.in_order

    @property
    def whole_model(self) -> bool:
        """Whether the model must run as a whole, and not block by block."""
        return self.losses or (self.statistic is not None and STATISTICS.get(self.statistic).USES_GRADIENTS)


@dataclass(frozen=True)
class Source:
    """What is compressed. `engine` holds the weights, and runs them where it is `Live`; `architecture` is theirs, in
    float32; `text` gives this rank's part of so many tokens of calibration text, in batches (n, length). What is
    finished outlives a crash in `kept`. `progress` (title, total) is entered for a long phase, and gives what is called
    for each of `total` Linears."""

    engine: Shards
    architecture: Architecture
    text: Callable[[int], Sequence[Tensor]]
    cache: Cache | None = None
    progress: Callable[[str, int], AbstractContextManager[Callable[[], object]]] = _silent

    def statistics(
        self, method: Any, shapes: Mapping[str, Shape], names: Collection[str]
    ) -> Iterator[tuple[Collection[str], Mapping[str, Tensor]]]:
        """The Linears `names` in the parts in which they are decomposed, and what the method needs to know of those of
        a part that this rank owns. A collective."""
        if method.statistic is None:
            yield names, NONE
        elif hasattr(self.engine, "model"):
            yield from collect(
                cast(Live, self.engine), method.statistic, shapes, names, self.text(method.calibration_tokens)
            )
        else:
            yield from collect_in_order(
                self.engine, self.blocks(method), STATISTICS.get(method.statistic), shapes, names
            )

    def blocks(self, method: Any) -> Iterator[Block]:
        """The blocks of the model in order, with what the calibration text gives each."""
        return walk(self.architecture, gathered(self.engine), self.text(method.calibration_tokens), self.engine.device)


@dataclass
class Allocated:
    """The ranks of each model that is asked for, and the decompositions that they were found by."""

    ranks: list[Ranks]
    spectra: Spectra | None = None


@dataclass(frozen=True)
class Compressor:
    """`method` finds the factors, `allocation` the ranks that a ratio comes to."""

    method: Method
    allocation: Allocation

    def needs(self, by_ratio: bool = True) -> Needs:
        """What is looked at; `by_ratio`: the ranks are not given but follow from a ratio."""
        spectra, in_order = by_ratio and self.allocation.spectra, self.method.sequential
        statistic = self.method.statistic if spectra or not in_order else None
        return Needs(spectra, statistic, by_ratio and self.allocation.losses, in_order)

    def even(self, shapes: Mapping[str, Shape], ratio: float) -> Ranks:
        """The ranks of `uniform`, which are known before any weight is: other allocations share out the same sum.
        Raises AllocationError."""
        return self._some(Uniform(self.allocation.multiple).ranks(shapes, ratio), ratio)

    def allocate(self, source: Source, shapes: Mapping[str, Shape], wanted: Sequence[float | Ranks]) -> Allocated:
        """The ranks of each model that is `wanted`, of that ratio or with these ranks. A collective. Raises
        AllocationError and DecompositionError, on every rank alike."""
        needs = self.needs(by_ratio=any(isinstance(one, float) for one in wanted))
        spectra = self._spectra(source, shapes) if needs.spectra else None
        losses = self._losses(source, spectra, shapes) if spectra and needs.losses else {}
        values = spectra.values if spectra else {}

        def ranks(ratio: float) -> Ranks:
            return self._some(self.allocation.ranks(shapes, ratio, values, losses), ratio)

        return Allocated([ranks(one) if isinstance(one, float) else one for one in wanted], spectra)

    def factors(
        self, source: Source, shapes: Mapping[str, Shape], allocated: Allocated
    ) -> Iterator[tuple[int, Decomposed]]:
        """The factors of those Linears whose rank changes, as shards, each with the place of its model in `allocated`:
        model by model where the method goes in order, else Linear by Linear. The spectra of `allocated` are used up. A
        collective at each step. Raises DecompositionError, on every rank alike."""
        todo, spectra = [changes(shapes, ranks) for ranks in allocated.ranks], allocated.spectra
        allocated.spectra = None  # it holds all that was decomposed, and its memory is needed
        if self.method.sequential:
            del spectra
            method = cast(SequentialMethod, self.method)
            for i, ranks in enumerate(todo):
                walk = partial(source.blocks, method)
                for made in factor_in_order(source.engine, walk, shapes, ranks, method, source.cache):
                    yield i, made
        elif spectra:
            yield from _cut(spectra, todo, [name for name in shapes if any(name in ranks for ranks in todo)])
        else:
            yield from self._decomposed(source, shapes, todo)

    def _decomposed(
        self, source: Source, shapes: Mapping[str, Shape], todo: Sequence[Ranks]
    ) -> Iterator[tuple[int, Decomposed]]:
        """Each Linear is decomposed once and cut for every model. For several models, the Linears of one part are kept
        decomposed meanwhile."""
        names = [name for name in shapes if any(name in ranks for ranks in todo)]
        for part, statistics in source.statistics(self.method, shapes, names):
            if len(todo) == 1:
                ranks = {name: todo[0][name] for name in part}
                yield from (
                    (0, made) for made in decompose(source.engine, shapes, ranks, self.method, statistics, source.cache)
                )
                continue
            for few in [part] if statistics else [[name] for name in part]:
                spectra = Spectra(source.engine, shapes, self.method, source.cache)
                spectra.add(few, statistics)
                yield from _cut(spectra, todo, few)

    def _spectra(self, source: Source, shapes: Mapping[str, Shape]) -> Spectra:
        """All Linears decomposed, by the statistics of the model as it stands."""
        spectra = Spectra(source.engine, shapes, self.method, source.cache)
        with source.progress("decompose", len(shapes)) as step:
            for part, statistics in source.statistics(self.method, shapes, shapes):
                spectra.add(part, statistics, lambda name: step())
        return spectra

    def _losses(self, source: Source, spectra: Spectra, shapes: Mapping[str, Shape]) -> dict[str, float]:
        """The increase of the loss with each Linear alone cut at the probe of the allocation."""
        allocation = cast(Measuring, self.allocation)
        text, probes = source.text(allocation.tokens), {name: allocation.probe(shape) for name, shape in shapes.items()}
        with source.progress("measure losses", len(shapes)) as step:
            return measure(cast(Live, source.engine), spectra, probes, text, lambda name: step())

    def _some(self, ranks: Ranks, ratio: float) -> Ranks:
        if ratio > 1 and not ranks:
            multiple = self.allocation.multiple
            raise AllocationError(
                f"ranks.multiple: at {ratio:g}x every rank is below {multiple}; choose a smaller multiple"
            )
        return ranks


def _cut(spectra: Spectra, todo: Sequence[Ranks], names: Collection[str]) -> Iterator[tuple[int, Decomposed]]:
    """The factors of the Linears `names` for every model of `todo`."""
    if len(todo) == 1:
        yield from ((0, made) for made in spectra.cut({name: todo[0][name] for name in names}))
        return
    for name in names:
        for i, ranks in enumerate(todo):
            if name in ranks:
                yield from ((i, made) for made in spectra.cut({name: ranks[name]}))

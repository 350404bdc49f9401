"""The decision how a model is compressed, made once: which spectra, text and losses are needed, and in which order.

The main job, `plrd factor` and the plan ask the same `Compressor`. They differ in the `Source` that it reads from: a
live sharded model, or a checkpoint with one block in memory at a time.
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
from plrd_train.compress.contracts import AllocationError, Block, BlockArchitecture, Cache, Decomposed, Live, Shards
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
    """What a method and an allocation need before the factors can be made, in this order.

    spectra: the ranks depend on the singular values, so that all Linears are decomposed first. statistic: the name of
    the statistic that is collected of every Linear, for the spectra or for a method that is not sequential. losses: the
    loss is measured with each Linear alone factored. in_order: the method is sequential.
    """

    spectra: bool
    statistic: str | None
    losses: bool
    in_order: bool

    @property
    def text(self) -> bool:
        """Whether calibration text is read."""
        return self.statistic is not None or self.losses or self.in_order

    @property
    def whole_model(self) -> bool:
        """Whether the whole model must be in memory and run, and not one block at a time."""
        return self.losses or (self.statistic is not None and STATISTICS.get(self.statistic).USES_GRADIENTS)


@dataclass(frozen=True)
class Source:
    """The model that is compressed. `engine` holds its weights, and runs it where it is `Live`; `architecture` is its
    structure, in float32. `text(tokens)` is this rank's part of that much calibration text, in batches (n, length) of
    token ids. Factors outlive a crash in `cache`. `progress(title, total)` is entered for a long phase; the function
    that it gives is called once for each of `total` Linears."""

    engine: Shards
    architecture: BlockArchitecture
    text: Callable[[int], Sequence[Tensor]]
    cache: Cache | None = None
    progress: Callable[[str, int], AbstractContextManager[Callable[[], object]]] = _silent

    def statistics(
        self, method: Any, shapes: Mapping[str, Shape], names: Collection[str]
    ) -> Iterator[tuple[Collection[str], Mapping[str, Tensor]]]:
        """The Linears `names` in the parts in which they are decomposed, each part with the statistics of the Linears
        that this rank owns. Each step of the iteration is a collective."""
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
        """The blocks of the model in order, with the inputs that they receive on the calibration text."""
        return walk(self.architecture, gathered(self.engine), self.text(method.calibration_tokens), self.engine.device)


@dataclass
class Allocated:
    """The ranks of each wanted model, and the decompositions by which they were chosen."""

    ranks: list[Ranks]
    spectra: Spectra | None = None


@dataclass(frozen=True)
class Compressor:
    """`method` finds the factors, `allocation` the ranks that a ratio comes to."""

    method: Method
    allocation: Allocation

    def needs(self, by_ratio: bool = True) -> Needs:
        """What is needed. `by_ratio`: a ratio is given, and the ranks follow from it; else the ranks are given."""
        spectra, in_order = by_ratio and self.allocation.spectra, self.method.sequential
        statistic = self.method.statistic if spectra or not in_order else None
        return Needs(spectra, statistic, by_ratio and self.allocation.losses, in_order)

    def even(self, shapes: Mapping[str, Shape], ratio: float) -> Ranks:
        """The ranks by `uniform`, which are known before any weight is read. Other allocations share out the same
        budget. Raises AllocationError."""
        return self._some(Uniform(self.allocation.multiple).ranks(shapes, ratio), ratio)

    def allocate(self, source: Source, shapes: Mapping[str, Shape], wanted: Sequence[float | Ranks]) -> Allocated:
        """The ranks of each model in `wanted`, which is given by its ratio or by its ranks. A collective. Raises
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
        """The factors of those Linears whose rank changes, as shards, each with the index of its model in `allocated`.
        They come model by model where the method is sequential, else Linear by Linear. The spectra of `allocated` are
        released. Each step of the iteration is a collective. Raises DecompositionError, on every rank alike."""
        todo, spectra = [changes(shapes, ranks) for ranks in allocated.ranks], allocated.spectra
        allocated.spectra = None  # to release the memory of all decompositions
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
        """Each Linear is decomposed once and cut for every model. For several models, the decompositions of one part
        are in memory together."""
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
        """All Linears decomposed, by the statistics of the model before any of them is factored."""
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

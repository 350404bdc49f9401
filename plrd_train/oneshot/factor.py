"""Members of a parent without any training: each Linear is read, factored and written, and the next one taken, on one process.

Every member is factored from the parent itself. What a method needs to know of a Linear comes from a walk over the parent's blocks
(`plrd_train.lowrank.walk`), one of which is in memory at a time, and a decomposition serves all members. Three things need the whole parent in
memory, as float32: gradients (`fisher`), measured losses (`ranks=sensitivity`), and inputs where the parent's blocks cannot be run one by one; and
ranks that depend on the spectra keep what is decomposed until the last spectrum is known.
"""

import ctypes
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plrd_train.config import Config
from plrd_train.errors import UserError
from plrd_train.evaluation.published import open_published
from plrd_train.hub.members import MemberWriter
from plrd_train.hub.modeling_plrd import model_ranks
from plrd_train.hub.models import HubArchitecture, probed
from plrd_train.hub.parents import Parent, load_config
from plrd_train.hub.reach import check_in_order, shapes_of
from plrd_train.hub.weights import WeightReader, parent_dtype
from plrd_train.lowrank.budget import last_blocks
from plrd_train.lowrank.calibration import KINDS, collect
from plrd_train.lowrank.distributed import Decomposed, DecompositionError, Spectra
from plrd_train.lowrank.factorizers import Statistic
from plrd_train.lowrank.ranks import ALLOCATIONS, SPECTRAL
from plrd_train.lowrank.sensitivity import measure
from plrd_train.lowrank.sequential import collect_in_order
from plrd_train.lowrank.walk import Alone, Block, blocks_of, gathered, walk
from plrd_train.recover.kept import KeptFactors
from plrd_train.tracking import console

# Weights are written in files of this size at most, so that a member in the making takes little memory.
SHARD_BYTES = 2**27
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
Ranks = dict[str, int]
# The text of that many tokens, in batches (n, length).
Text = Callable[[int], Sequence[Tensor]]


@dataclass
class _Whole(Alone):
    """A parent that is in memory, and can run."""

    model: Any = None


class OneShot:
    """The factoring of `parent` as `config` says: factorizer, ranks and linears; `text` gives the calibration text. Raises UserError.

    What a method that takes the Linears in order has finished of a member is kept in the folder `unfinished` until the member is published.
    """

    def __init__(self, parent: Parent, config: Config, text: Text, unfinished: Path):
        self._parent, self._config, self._text = parent, config, text
        self._factorizer = config.factorizer.settings
        self.hub_config = load_config(parent)
        self.dtype = parent_dtype(parent)
        with torch.device("meta"):
            model = HubArchitecture(self.hub_config).build()
        self.params = sum(parameter.numel() for parameter in model.parameters())
        self.blocks = list(blocks_of(model))
        if self._factorizer.sequential:
            check_in_order(self.hub_config, config.factorizer.name, parent.path)
        self.shapes = shapes_of(model, self.hub_config, config.linears.include, config.linears.exclude, parent.path)
        self._reader = WeightReader(parent)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.kept = KeptFactors(unfinished, self._device)

    def of_budget(self, budget: float) -> Ranks:
        """The ranks of a member that keeps that share of all parameters (LLM-ROM)."""
        try:
            return last_blocks(self.shapes, self.blocks, self.params, budget, self._config.ranks.multiple)
        except ValueError as error:
            raise UserError(f"--budget: {error}; give a larger one") from None

    def write(self, wanted: Mapping[Path, Ranks | float]) -> Iterator[tuple[MemberWriter, Ranks]]:
        """Factor the members that are `wanted`, by the folder of each: of that ratio, or with these ranks. Yields each, and its ranks, when its
        weights are complete, to be published."""
        _give_back_what_is_freed()
        try:
            by_spectra = self._config.ranks.name in SPECTRAL and any(isinstance(of, float) for of in wanted.values())
            spectra = self._spectra() if by_spectra else None
            known = self._known(wanted, spectra)
            if self._factorizer.sequential:
                del spectra  # which holds all that was decomposed
                yield from self._one_by_one(known)
            else:
                yield from self._together(known, spectra)
        except DecompositionError as error:
            raise UserError(f"{self._parent.path}: {error}") from None

    # How members come about

    def _together(self, wanted: Mapping[Path, Ranks], spectra: Spectra | None) -> Iterator[tuple[MemberWriter, Ranks]]:
        """By a method that looks at each Linear by itself: each is decomposed once, and cut for every member."""
        names = [name for name in self.shapes if any(name in ranks for ranks in wanted.values())]
        with ExitStack() as stack:
            writers = [stack.enter_context(closing(self._writer(folder, ranks))) for folder, ranks in wanted.items()]
            with console.progress("factor", len(names), "weights") as bar:
                for part, decomposed in [(names, spectra)] if spectra else self._parts(names):
                    for name in part:
                        for writer, ranks in zip(writers, wanted.values(), strict=True):
                            if name in ranks:
                                _write(writer, decomposed.cut({name: ranks[name]})[name])
                        bar.update(1)
            for writer, ranks in zip(writers, wanted.values(), strict=True):
                yield self._complete(writer, ranks)

    def _one_by_one(self, wanted: Mapping[Path, Ranks]) -> Iterator[tuple[MemberWriter, Ranks]]:
        """By a method that takes the Linears in order, each on what those before it give."""
        for folder, ranks in wanted.items():
            with closing(self._writer(folder, ranks)) as writer, console.progress(f"factor {folder.name}", len(ranks), "weights") as bar:
                for made in self._factorizer.in_order(self._engine, self._walk, self.shapes, ranks, self.kept):
                    _write(writer, made)
                    bar.update(1, error=made.rel_error)
                yield self._complete(writer, ranks)

    def _writer(self, folder: Path, ranks: Ranks) -> MemberWriter:
        all_ranks = {**model_ranks(self.hub_config), **ranks}
        return MemberWriter(folder, config=self.hub_config, ranks=all_ranks, dtype=self.dtype, parent=self._parent, max_shard_bytes=SHARD_BYTES)

    def _complete(self, writer: MemberWriter, ranks: Ranks) -> tuple[MemberWriter, Ranks]:
        """Add what is not factored, as the parent has it."""
        for name in writer.missing():
            linear, _, leaf = name.rpartition(".up.bias")
            now_low_rank = leaf == "" and linear in ranks and self.shapes[linear].rank is None
            writer.add(name, self._reader.read(f"{linear}.bias" if now_low_rank else name))
        writer.finish()
        return writer, ranks

    # What they are made from

    def _parts(self, names: Collection[str]) -> Iterator[tuple[Collection[str], Spectra]]:
        """The Linears `names`, a few of them decomposed at a time."""
        for part, statistics in self._statistics(names):
            spectra = Spectra(self._engine, self.shapes, self._factorizer)
            spectra.add(part, statistics)
            yield part, spectra

    def _spectra(self) -> Spectra:
        """All Linears decomposed, by the statistics of the parent."""
        spectra = Spectra(self._engine, self.shapes, self._factorizer)
        with console.progress("decompose", len(self.shapes), "weights") as bar:
            for part, statistics in self._statistics(self.shapes):
                spectra.add(part, statistics, lambda name: bar.update(1))
        return spectra

    def _statistics(self, names: Collection[str]) -> Iterator[tuple[Collection[str], Mapping[str, Statistic]]]:
        kind = self._factorizer.statistics
        if kind is None:
            yield from (([name], {}) for name in names)
        elif isinstance(self._engine, _Whole):
            yield from collect(self._engine, kind, self.shapes, names, self._text(self._factorizer.calibration_tokens))
        else:
            yield from collect_in_order(self._engine, self._walk(), KINDS[kind], self.shapes, names)

    def _allocated(self, ratio: float, values: Mapping[str, Tensor] | None = None, measured: Any = None) -> Ranks:
        ranks = ALLOCATIONS[self._config.ranks.name](self.shapes, ratio, self._config.ranks.multiple, values, measured)
        if not ranks:
            raise UserError(f"ranks.multiple: at {ratio:g}x every rank is below {self._config.ranks.multiple}; choose a smaller multiple")
        return ranks

    def _known(self, wanted: Mapping[Path, Ranks | float], spectra: Spectra | None) -> dict[Path, Ranks]:
        """The ranks of each member."""
        measured = None
        if spectra and self._config.ranks.tokens:
            measured = measure(self._engine, spectra, self.shapes, self._text(self._config.ranks.tokens))
        values = spectra.values if spectra else None
        return {folder: self._allocated(of, values, measured) if isinstance(of, float) else of for folder, of in wanted.items()}

    def _walk(self) -> Iterator[Block]:
        architecture = HubArchitecture(self.hub_config)
        return walk(architecture, gathered(self._engine), self._text(self._factorizer.calibration_tokens), self._device)

    @cached_property
    def _engine(self) -> Any:
        kind = self._factorizer.statistics
        needs_blocks = kind is not None and not KINDS[kind].of_gradients
        if self._config.ranks.tokens or (kind and not needs_blocks) or (needs_blocks and probed(self.hub_config).unchained):
            model = open_published(self._parent, torch.float32).model
            return _Whole(model.get_parameter, self._device, model=model)
        return Alone(self._reader.read, self._device)


def _give_back_what_is_freed() -> None:
    """Let this process return each block of 4 MiB and more to the system once it is freed. By itself glibc keeps those of up to 32 MiB, such as
    activations, for what comes later: half as much again as what is in use at the peak."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**22)


def _write(writer: MemberWriter, made: Decomposed) -> None:
    writer.add(f"{made.name}.up.weight", made.up)
    writer.add(f"{made.name}.down.weight", made.down)

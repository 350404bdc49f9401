"""Members without any training, on one process: read a Linear, factor it, write it, take the next.

Every member is factored from the parent itself, and one decomposition serves all members. A method gets its statistics
from a walk over the parent's blocks (`plrd_train.compress.blocks`) with one block in memory at a time. Three things
need the whole parent in memory, in float32: gradients (`fisher`), measured losses (`ranks=sensitivity`), and parents
whose blocks cannot be run one by one. Allocations that depend on the spectra hold all decompositions until the last
one is known.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plrd_train.compress import forms
from plrd_train.compress.blocks import Alone, blocks_of
from plrd_train.compress.budget import last_blocks
from plrd_train.compress.compressor import Allocated, Needs, Ranks, Source
from plrd_train.compress.contracts import AllocationError, Decomposed, DecompositionError
from plrd_train.compress.factor_cache import FactorCache
from plrd_train.compress.rounds import changes
from plrd_train.config.schema import Config
from plrd_train.errors import UserError
from plrd_train.parents.modeling_plrd import model_ranks
from plrd_train.parents.models import HubArchitecture, probe_of
from plrd_train.parents.parent import Parent, load_config
from plrd_train.parents.published import open_published
from plrd_train.parents.reach import check_in_order, shapes_of
from plrd_train.parents.weights import WeightReader, parent_dtype
from plrd_train.publish.members import MemberWriter
from plrd_train.tracking import console

# Weights are written in files of this size at most, so that a member in the making takes little memory.
SHARD_BYTES = 2**27
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
# The text of that many tokens, in batches (n, length).
Text = Callable[[int], Sequence[Tensor]]


@dataclass
class _Whole(Alone):
    """A parent that is whole in memory and can run."""

    model: Any = None


class OneShot:
    """The factoring of `parent` as `config` says: factorizer, ranks and linears; `text` gives the calibration text.
    Raises UserError.

    What a method that takes the Linears in order has finished of a member is kept in the folder `unfinished` until the
    member is published.
    """

    def __init__(self, parent: Parent, config: Config, text: Text, unfinished: Path):
        self._parent, self._text, self.form = parent, text, config.form.name
        self._compressor = config.compressor()
        self.hub_config = load_config(parent)
        self.dtype = parent_dtype(parent)
        with torch.device("meta"):
            model = HubArchitecture(self.hub_config).build()
        self.params = sum(parameter.numel() for parameter in model.parameters())
        self.blocks = list(blocks_of(model))
        if self._compressor.needs().in_order:
            check_in_order(self.hub_config, config.factorizer.name, parent.path)
        self.shapes = shapes_of(
            model, self.hub_config, config.linears.include, config.linears.exclude, parent.path, self.form
        )
        self._reader = WeightReader(parent)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.kept = FactorCache(unfinished, self._device)

    def of_budget(self, budget: float) -> Ranks:
        """The ranks of a member that keeps that share of all parameters (LLM-ROM)."""
        try:
            return last_blocks(self.shapes, self.blocks, self.params, budget, self._compressor.allocation.multiple)
        except ValueError as error:
            raise UserError(f"--budget: {error}; give a larger one") from None

    def write(self, wanted: Mapping[Path, Ranks | float]) -> Iterator[tuple[MemberWriter, Ranks]]:
        """Factor the members that are `wanted`, by the folder of each: of that ratio, or with these ranks. Yields each,
        and its ranks, when its weights are complete, to be published."""
        _give_back_what_is_freed()
        by_ratio = any(isinstance(of, float) for of in wanted.values())
        try:
            source = self._source(self._compressor.needs(by_ratio))
            allocated = self._compressor.allocate(source, self.shapes, list(wanted.values()))
            members = dict(zip(wanted, allocated.ranks, strict=True))
            if self._compressor.needs().in_order:
                del allocated  # its spectra take memory
                yield from self._one_by_one(members, source)
            else:
                yield from self._together(members, self._compressor.factors(source, self.shapes, allocated))
        except AllocationError as error:
            raise UserError(str(error)) from None
        except DecompositionError as error:
            raise UserError(f"{self._parent.path}: {error}") from None

    # Making the members

    def _together(
        self, members: Mapping[Path, Ranks], made: Iterator[tuple[int, Decomposed]]
    ) -> Iterator[tuple[MemberWriter, Ranks]]:
        """By a method that factors each Linear by itself: all members are written at once."""
        with ExitStack() as stack:
            writers = [stack.enter_context(closing(self._writer(folder, ranks))) for folder, ranks in members.items()]
            with console.progress("factor", sum(map(len, members.values())), "weights") as bar:
                for i, one in made:
                    self._write(writers[i], one.name, one.up, one.down)
                    bar.update(1)
            for writer, ranks in zip(writers, members.values(), strict=True):
                yield self._complete(writer, ranks)

    def _one_by_one(self, members: Mapping[Path, Ranks], source: Source) -> Iterator[tuple[MemberWriter, Ranks]]:
        """By a method that takes the Linears in order: one member after the other."""
        for folder, ranks in members.items():
            with (
                closing(self._writer(folder, ranks)) as writer,
                console.progress(f"factor {folder.name}", len(ranks), "weights") as bar,
            ):
                for _, one in self._compressor.factors(source, self.shapes, Allocated([ranks])):
                    self._write(writer, one.name, one.up, one.down)
                    bar.update(1, error=one.rel_error)
                yield self._complete(writer, ranks)

    def _writer(self, folder: Path, ranks: Ranks) -> MemberWriter:
        return MemberWriter(
            folder,
            config=self.hub_config,
            ranks={**model_ranks(self.hub_config), **ranks},
            form=self.form,
            dtype=self.dtype,
            parent=self._parent,
            max_shard_bytes=SHARD_BYTES,
        )

    def _write(self, writer: MemberWriter, linear: str, up: Tensor, down: Tensor) -> None:
        up, down = forms.get(self.form).pack(up, down)
        writer.add(f"{linear}.up.weight", up)
        writer.add(f"{linear}.down.weight", down)

    def _complete(self, writer: MemberWriter, ranks: Ranks) -> tuple[MemberWriter, Ranks]:
        """Copy what is not factored from the parent."""
        for linear in model_ranks(self.hub_config).keys() - changes(self.shapes, ranks).keys():
            up, down = (self._reader.read(f"{linear}.{part}").float() for part in ("up.weight", "down.weight"))
            self._write(writer, linear, up, down)
        for name in writer.missing():
            linear, _, leaf = name.rpartition(".up.bias")
            now_low_rank = leaf == "" and linear in ranks and self.shapes[linear].rank is None
            writer.add(name, self._reader.read(f"{linear}.bias" if now_low_rank else name))
        writer.finish()
        return writer, ranks

    # The source

    def _source(self, needs: Needs) -> Source:
        """The whole parent in memory where that is needed; else one block or Linear of it at a time."""

        @contextmanager
        def shown(title: str, total: int) -> Iterator[Callable[[], object]]:
            with console.progress(title, total, "weights") as bar:
                yield lambda: bar.update(1)

        engine: Any = Alone(self._reader.read, self._device)
        if needs.whole_model or (needs.statistic and probe_of(self.hub_config).unchained):
            model = open_published(self._parent, torch.float32).model
            engine = _Whole(self._reader.read, self._device, model=model)
        kept = self.kept if needs.in_order else None
        return Source(engine, HubArchitecture(self.hub_config), self._text, kept, shown)


def _give_back_what_is_freed() -> None:
    """Make malloc return each block of 4 MiB and more to the system when it is freed. By default glibc keeps freed
    blocks of up to 32 MiB, such as activations, which raises the peak by half."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**22)

"""The decomposition in order, one block of a walk after the other. Finished blocks outlive a crash: a restart runs
them, and that is all."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from plrd_train.compress.algebra.factors import Factors
from plrd_train.compress.contracts import Block, Cache, Decomposed, Shards
from plrd_train.compress.methods import Factorizer
from plrd_train.compress.owned import fingerprint, method_of, packed, unpacked
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import agreed, owners
from plrd_train.compress.sequential import Made, factors_of, inside, put_everywhere, refuse, shards


@torch.no_grad()
def block_by_block(
    engine: Shards,
    walks: Sequence[Iterator[Block]],
    shapes: Mapping[str, Shape],
    ranks: Mapping[str, int],
    factorizer: Factorizer,
    make: Callable[..., dict[str, Made]],
    kept: Cache | None = None,
) -> Iterator[Decomposed]:
    """Factor every Linear named in `ranks` to that rank, and yield its factors as shards.

    `walks` go side by side over the weights of `engine`, which is left as it is; `make` is given a block of each and
    factors those of the last. What is in `kept` already is not made again. A collective at each step of the iteration.
    Raises DecompositionError, on every rank alike, as `plrd_train.compress.rounds.decompose` does, and where a Linear
    stands outside the blocks or no text reaches it.
    """
    finished, left = Finished(engine, shapes, ranks, factorizer, kept), set(ranks)
    for blocks in zip(*walks, strict=True):
        block = blocks[-1]
        made = finished.restored(block)
        if made is None:
            made = make(*blocks)
            finished.keep(block, made)
        for name, one in made.items():
            left.remove(name)
            yield shards(engine, block, name, one)
    refuse(left)


class Finished:
    """What `kept` has, or is given, of blocks that are factored to `ranks` by one method; without `kept` nothing. All
    methods are collectives.

    The key of a block is a digest of all that its factors follow from: the method, the text, and the weights and ranks
    of this block and of all before it. The weights are taken as they are read, and of the text what the first block is
    given; so nothing in it depends on how sums are rounded, and any number of ranks finds the same.
    """

    def __init__(
        self,
        engine: Shards,
        shapes: Mapping[str, Shape],
        ranks: Mapping[str, int],
        factorizer: Factorizer,
        kept: Cache | None,
    ):
        self._engine, self._shapes, self._ranks, self._kept = engine, shapes, ranks, kept
        self._key, self._text = method_of(factorizer), ""

    def restored(self, block: Block) -> dict[str, Made] | None:
        """Put the factors of its Linears into the block, as its weights stand at first; None, and nothing is changed,
        where one is missing."""
        kept, names = self._kept, self._names(block)
        if kept is None:
            return None
        self._text = self._text or _digest_of(self._engine, block.inputs)
        self._key = fingerprint(
            f"{self._key} {self._text} {[(name, self._ranks[name]) for name in names]}", block.module.parameters()
        )
        found: dict[str, Factors] = {}

        def read() -> dict[str, tuple[float, float | None]]:
            for name in self._own(names):
                tensors = kept.get(self._kept_as(name), self._key)
                if tensors is not None:
                    found[name] = unpacked(tensors)
            return {name: (one.rel_error, one.metric_error) for name, one in found.items()}

        start = time.perf_counter()
        reports = agreed(self._engine, read)
        if sum(map(len, reports)) < len(names):
            return None
        seconds = (time.perf_counter() - start) / max(len(names), 1)
        owner = owners(self._shapes, names, self._engine.world_size)
        put_everywhere(self._engine, block, self._shapes, self._ranks, owner, found)
        return {name: Made(owner[name], seconds, *reports[owner[name]][name]) for name in names}

    def keep(self, block: Block, made: Mapping[str, Made]) -> None:
        """Keep the factors that stand in the block. Raises DecompositionError, on every rank alike, where that
        fails."""
        kept = self._kept

        def write() -> None:
            assert kept is not None
            for name in made.keys() & self._own(self._names(block)):
                factors = Factors(*factors_of(block, name), made[name].rel_error, made[name].metric_error)
                kept.put(self._kept_as(name), self._key, packed(factors))

        if kept is not None:
            agreed(self._engine, write)

    def _names(self, block: Block) -> list[str]:
        return [f"{block.name}.{linear}" for linear in inside(block, self._ranks)]

    def _own(self, names: Sequence[str]) -> list[str]:
        """Those that this rank keeps, and gets."""
        owner = owners(self._shapes, names, self._engine.world_size)
        return [name for name in names if owner[name] == self._engine.rank]

    def _kept_as(self, name: str) -> str:
        return f"{name}.rank-{self._ranks[name]}"


def _digest_of(engine: Shards, inputs: Sequence[torch.Tensor]) -> str:
    """Of the sequences of all ranks, however they are dealt: of each (length, hidden) what its positions add up to."""
    sums = (sequence for batch in inputs for sequence in batch.sum(-1, dtype=torch.float64).cpu())
    own = sum(int.from_bytes(hashlib.sha256(sequence.numpy().tobytes()).digest()) for sequence in sums)
    return f"{sum(engine.share(own)):x}"

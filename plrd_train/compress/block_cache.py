"""Factored blocks that outlive a crash: a restart reads their factors and runs them, and does not factor them again."""

import hashlib
import time
from collections.abc import Mapping, Sequence

import torch

from plrd_train.compress.algebra.gram import Factors
from plrd_train.compress.contracts import BlockTask, Cache, FactorReport, Shards
from plrd_train.compress.factor_cache import as_factors, as_tensors, digest, identity
from plrd_train.compress.methods import Method
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import agreed, owners
from plrd_train.compress.steps import pair_of, put_everywhere


class BlockCache:
    """The blocks in `cache` that one method has factored to `ranks`; without a cache there are none. All methods are
    collectives.

    The key of a block is a digest of everything that its factors depend on: the method, the text, and the weights and
    ranks of this block and of all blocks before it. The weights are those before factoring, and the text counts by the
    input of the first block. So the key does not depend on how sums are rounded, and any number of ranks finds the
    same entries.
    """

    def __init__(
        self,
        engine: Shards,
        shapes: Mapping[str, Shape],
        ranks: Mapping[str, int],
        method: Method,
        cache: Cache | None,
    ):
        self._engine, self._shapes, self._ranks, self._cache = engine, shapes, ranks, cache
        self._key, self._text = identity(method), ""

    def restore(self, task: BlockTask) -> dict[str, FactorReport] | None:
        """Put the cached factors of its Linears into the block, which is not factored yet. Returns None, and leaves the
        block unchanged, where the cache lacks one of them."""
        cache, block, names = self._cache, task.block, _names(task)
        if cache is None:
            return None
        self._text = self._text or _digest_of(self._engine, block.inputs)
        self._key = digest(
            f"{self._key} {self._text} {[(name, self._ranks[name]) for name in names]}", block.module.parameters()
        )
        found: dict[str, Factors] = {}

        def read() -> dict[str, tuple[float, float | None]]:
            for name in self._own(names):
                tensors = cache.get(self._entry(name), self._key)
                if tensors is not None:
                    found[name] = as_factors(tensors)
            return {name: (one.rel_error, one.metric_error) for name, one in found.items()}

        start = time.perf_counter()
        errors = agreed(self._engine, read)
        if sum(map(len, errors)) < len(names):
            return None
        seconds = (time.perf_counter() - start) / max(len(names), 1)
        owner = owners(self._shapes, names, self._engine.world_size)
        put_everywhere(task, owner, found)
        return {name: FactorReport(owner[name], seconds, *errors[owner[name]][name]) for name in names}

    def put(self, task: BlockTask, reports: Mapping[str, FactorReport]) -> None:
        """Store the factors that are in the block. Raises DecompositionError, on every rank alike, where that fails."""
        cache = self._cache

        def write() -> None:
            assert cache is not None
            for name in reports.keys() & self._own(_names(task)):
                report = reports[name]
                factors = Factors(*pair_of(task.block, name), report.rel_error, report.metric_error)
                cache.put(self._entry(name), self._key, as_tensors(factors))

        if cache is not None:
            agreed(self._engine, write)

    def _own(self, names: Sequence[str]) -> list[str]:
        """Those that this rank stores and reads."""
        owner = owners(self._shapes, names, self._engine.world_size)
        return [name for name in names if owner[name] == self._engine.rank]

    def _entry(self, name: str) -> str:
        return f"{name}.rank-{self._ranks[name]}"


def _names(task: BlockTask) -> list[str]:
    return [f"{task.block.name}.{linear}" for linear in task.linears]


def _digest_of(engine: Shards, inputs: Sequence[torch.Tensor]) -> str:
    """A digest of the sequences of all ranks that does not depend on how they are dealt: the sum of their hashes. A
    sequence (length, hidden) is hashed by the sum over the channels at each position."""
    sums = (sequence for batch in inputs for sequence in batch.sum(-1, dtype=torch.float64).cpu())
    own = sum(int.from_bytes(hashlib.sha256(sequence.numpy().tobytes()).digest()) for sequence in sums)
    return f"{sum(engine.share(own)):x}"

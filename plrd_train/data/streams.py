"""One canonical stream: an endless sequence of documents, cut into packed sequences.

The order depends on (seed, epoch) alone. A cursor records a position, so that reading can resume there.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from plrd_train.data.documents import Document, naming_shard
from plrd_train.errors import UserError

_UNIT_ORDER, _DOCUMENT_ORDER = 0, 1  # keep the two families of permutations apart


class Unit(NamedTuple):
    """A unit of loading and shuffling: the lines of one shard whose index is `stripe` modulo `stripes`.

    `number` is its index in the corpus.
    """

    number: int
    shard: str
    stripe: int
    stripes: int


class Cursor(NamedTuple):
    """A position in a stream.

    epoch: from 0. unit: index in the epoch's order of units. document: index in the shuffled unit. offset: tokens of
    that document already read.
    """

    epoch: int
    unit: int
    document: int
    offset: int


class Packed(NamedTuple):
    """A packed sequence: `tokens` (length,) int64, their counts by domain, and the cursor after the last one."""

    tokens: np.ndarray
    domain_tokens: dict[str, int]
    cursor: Cursor


START = Cursor(0, 0, 0, 0)


def deal_units(shards: Sequence[str], streams: int) -> list[list[Unit]]:
    """The units of each stream: unit u goes to stream u mod `streams`.

    With fewer shards than streams, each shard is split into ceil(streams / shards) stripes. Each stream then has at
    least one unit, and neighbouring streams read different shards.
    """
    stripes = -(-streams // len(shards))
    units = [Unit(u, shards[u % len(shards)], u // len(shards), stripes) for u in range(len(shards) * stripes)]
    return [units[stream::streams] for stream in range(streams)]


def _permutation(count: int, *key: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)


class Stream:
    """Reads stream `index`, which consists of `units`, from `cursor` on.

    The first `take` opens the unit at the cursor; nothing is opened before. `load` returns the documents of a unit,
    which stay in memory until the next unit. `encode` returns the token ids of a document.
    """

    def __init__(
        self,
        index: int,
        units: Sequence[Unit],
        load: Callable[[Unit], list[Document]],
        encode: Callable[[Document], list[int]],
        seed: int,
        cursor: Cursor,
    ):
        self._index, self._units, self._load, self._encode, self._seed = index, units, load, encode, seed
        self._documents = self._read(cursor)
        self._cursor = cursor  # of the current document; `offset` counts its tokens already taken
        self._ids = np.empty(0, dtype=np.int64)
        self._domain = ""

    def take(self, length: int) -> Packed:
        """The next `length` tokens. Raises the errors of `read_documents`, and UserError if an epoch has no token."""
        tokens = np.empty(length, dtype=np.int64)
        domains: Counter[str] = Counter()
        filled = 0
        while filled < length:
            while self._cursor.offset >= len(self._ids):
                self._cursor, self._domain, self._ids = next(self._documents)
            offset = self._cursor.offset
            count = min(length - filled, len(self._ids) - offset)
            tokens[filled : filled + count] = self._ids[offset : offset + count]
            domains[self._domain] += count
            filled += count
            self._cursor = self._cursor._replace(offset=offset + count)
        return Packed(tokens, dict(domains), self._cursor)

    def _read(self, start: Cursor) -> Iterator[tuple[Cursor, str, np.ndarray]]:
        """Yield (cursor, domain, token ids) of each document from `start` on.

        The cursor's offset is where to begin the document: `start.offset` for the first, 0 for all others.
        """
        for epoch in itertools.count(start.epoch):
            found = any(start[1:])  # an epoch that is resumed midway may have no tokens left
            order = _permutation(len(self._units), _UNIT_ORDER, self._seed, epoch, self._index)
            for turn in range(start.unit, len(order)):
                unit = self._units[order[turn]]
                documents = self._load(unit)
                shuffled = _permutation(len(documents), _DOCUMENT_ORDER, self._seed, epoch, unit.number)
                for place in range(start.document, len(shuffled)):
                    document = documents[shuffled[place]]
                    with naming_shard(unit.shard):
                        ids = np.asarray(self._encode(document), dtype=np.int64)
                    found = found or len(ids) > 0
                    yield Cursor(epoch, turn, place, start.offset), document.domain, ids
                    start = START
            if not found:
                raise UserError(
                    f"{self._units[0].shard} and the other shards of data stream {self._index} hold no text: the "
                    "corpus has too few documents for so many streams; lower data.streams or give more text"
                )

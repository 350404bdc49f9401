"""One canonical stream: endless documents, ordered by (seed, epoch) alone and cut into packed sequences, with a cursor
to come back to."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from plrd_train.data.documents import Document, named
from plrd_train.errors import UserError

_UNIT_ORDER, _DOCUMENT_ORDER = 0, 1  # keep the two families of permutations apart


class Unit(NamedTuple):
    """What is loaded and shuffled at once: the lines of one shard whose index is `stripe` modulo `stripes`. `number` is
    its place in the corpus."""

    number: int
    shard: str
    stripe: int
    stripes: int


class Cursor(NamedTuple):
    """A place in a stream: epoch, index in that epoch's order of units, index in the shuffled unit, and tokens of that
    document already read."""

    epoch: int
    unit: int
    document: int
    offset: int


class Packed(NamedTuple):
    """`tokens` (length,) int64; how many of them each domain gave; the cursor behind the last of them."""

    tokens: np.ndarray
    domain_tokens: dict[str, int]
    cursor: Cursor


START = Cursor(0, 0, 0, 0)


def deal_units(shards: Sequence[str], streams: int) -> list[list[Unit]]:
    """The units of each stream: unit u goes to stream u mod `streams`.

    Where there are fewer shards than streams each shard is split into ceil(streams / shards) stripes, so that each
    stream has one unit at least, and neighbouring streams read different shards.
    """
    stripes = -(-streams // len(shards))
    units = [Unit(u, shards[u % len(shards)], u // len(shards), stripes) for u in range(len(shards) * stripes)]
    return [units[stream::streams] for stream in range(streams)]


def _permutation(count: int, *key: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)


class Stream:
    """Reads stream `index`, made of `units`, from `cursor` on. Nothing is opened before the first `take`, and then only
    the unit at the cursor.

    `load` gives the documents of a unit, all of which are held in memory until the stream moves on; `encode` gives the
    token ids of a document.
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
        self._cursor = cursor  # of the document in hand; the offset is the one to start it at
        self._ids = np.empty(0, dtype=np.int64)
        self._domain = ""

    def take(self, length: int) -> Packed:
        """The next `length` tokens. Raises UserError as `read_documents` does, and where a whole epoch holds no
        token."""
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
        """Each document from `start` on, with the cursor at which to begin it: its head, but for the first
        `start.offset` tokens of the first."""
        for epoch in itertools.count(start.epoch):
            found = any(start[1:])  # an epoch entered halfway may well hold nothing more
            order = _permutation(len(self._units), _UNIT_ORDER, self._seed, epoch, self._index)
            for turn in range(start.unit, len(order)):
                unit = self._units[order[turn]]
                documents = self._load(unit)
                shuffled = _permutation(len(documents), _DOCUMENT_ORDER, self._seed, epoch, unit.number)
                for place in range(start.document, len(shuffled)):
                    document = documents[shuffled[place]]
                    with named(unit.shard):
                        ids = np.asarray(self._encode(document), dtype=np.int64)
                    found = found or len(ids) > 0
                    yield Cursor(epoch, turn, place, start.offset), document.domain, ids
                    start = START
            if not found:
                raise UserError(
                    f"{self._units[0].shard} and the other shards of data stream {self._index} hold no text: the "
                    "corpus has too few documents "
                    "for so many streams; lower data.streams or give more text"
                )

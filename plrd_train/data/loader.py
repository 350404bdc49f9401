"""Batches of packed sequences, in an order that does not depend on the number of ranks. One thread reads ahead."""

import copy
import itertools
import math
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from plrd_train.data.corpus import Corpus
from plrd_train.data.documents import Document, UnreadableError, encode, fingerprint, read_documents
from plrd_train.data.streams import START, Cursor, Packed, Stream, Unit, deal_units
from plrd_train.errors import UserError

# Seconds of wait before each retry of a shard read: about a minute in all.
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class Batch:
    """One rank's share of the global sequences [first, first + sequences).

    `input_ids` (n, seq_len) int64 is in ascending global order; n may be 0. `domain_tokens` counts its tokens by
    domain.
    """

    input_ids: Tensor
    domain_tokens: dict[str, int]
    first: int


class Loader:
    """Packed training sequences of a corpus. Their order depends on the seed, not on the number of ranks.

    The corpus is divided into `streams` canonical streams (see `plrd_train.data.streams`). A stream is an endless
    sequence of documents: encoded by the tokenizer, each followed by EOS if `append_eos`, concatenated, and cut into
    sequences of `seq_len` tokens. After its last document a stream begins the next epoch, in a new order. Global
    sequence i comes from stream i mod `streams`. Only rank s mod `world_size` reads stream s.

    Each stream of this rank holds one unit (a shard, or a stripe of one) in memory. A failed read is retried for about
    a minute; the wait doubles each time, and each retry prints a warning to standard error. One thread reads ahead as
    many sequences as the last call asked for. Its UserError is raised by the `next` that needs the sequence. The loader
    is not thread-safe.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seq_len: int,
        streams: int,
        seed: int,
        append_eos: bool,
        rank: int,
        world_size: int,
        skip_bad: bool = False,
    ):
        """Raises UserError if `append_eos` is set and the tokenizer has no EOS, or the model no embedding for it."""
        if append_eos and tokenizer.eos_token_id is None:
            raise UserError("data.append_eos=true, but this tokenizer has no EOS token; set data.append_eos=false")
        if append_eos and tokenizer.eos_token_id >= getattr(tokenizer, "embeddings", math.inf):
            raise UserError(
                "data.append_eos=true, but the model has no embedding for the EOS token of this tokenizer; set "
                "data.append_eos=false"
            )
        self._tokenizer = copy.deepcopy(tokenizer)  # fast tokenizers refuse to be used by two threads at once
        self._eos = [tokenizer.eos_token_id] if append_eos else []
        self._identity = {
            "corpus": corpus.fingerprint,
            "tokenizer": fingerprint(self._tokenizer),
            "seed": seed,
            "streams": streams,
        }
        self._seq_len, self._streams, self._seed, self._skip_bad = seq_len, streams, seed, skip_bad
        self._rank, self._world_size = rank, world_size
        self._units = deal_units(corpus.shards, streams)
        self._skipped: dict[int, Counter[str]] = {}
        self._closing = threading.Event()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")  # one worker, so first in first out
        self._ahead: deque[Future[Packed]] = deque()
        self._start(0, dict.fromkeys(range(rank, streams, world_size), START))

    def _start(self, sequence: int, cursors: dict[int, Cursor]) -> None:
        """Move to global sequence `sequence`.

        `_sequence` and `_cursors` are the position of the sequences returned; `_own` and `_readers` that of those read
        ahead.
        """
        for future in self._ahead:
            future.cancel()  # one may still be running, but on an old stream that nothing else reads
        self._ahead.clear()
        self._sequence, self._cursors = sequence, cursors
        self._own = self._own_sequences(sequence)
        self._readers = {
            s: Stream(s, self._units[s], self._load, self._encode, self._seed, cursor) for s, cursor in cursors.items()
        }

    def _own_sequences(self, first: int) -> Iterator[int]:
        return (i for i in itertools.count(first) if i % self._streams in self._cursors)

    def _load(self, unit: Unit) -> list[Document]:
        for seconds in WAITS_S:
            try:
                return self._read(unit)
            except UnreadableError as error:
                print(f"warning: {error}; trying again in {seconds:g} s", file=sys.stderr, flush=True)
                if self._closing.wait(seconds):
                    raise
        return self._read(unit)

    def _read(self, unit: Unit) -> list[Document]:
        skipped: Counter[str] = Counter()
        documents = list(
            read_documents(
                unit.shard, stripe=unit.stripe, stripes=unit.stripes, skip_bad=self._skip_bad, skipped=skipped
            )
        )
        if skipped:
            # A new dict, since the other thread may be reading the old one.
            self._skipped = {**self._skipped, unit.number: skipped}
        return documents

    def _encode(self, document: Document) -> list[int]:
        ids = encode(self._tokenizer, document.text)
        return ids if ids[-1:] == self._eos else ids + self._eos  # a tokenizer may end with EOS by its own rule

    def next(self, sequences: int) -> Batch:
        """Advance by `sequences` global sequences, the same number on every rank, and return this rank's share.

        Raises UserError on bad input; the position is then unchanged.
        """
        count = self.share(self._sequence, sequences, self._rank)
        while len(self._ahead) < 2 * count:
            self._ahead.append(self._reader.submit(self._readers[next(self._own) % self._streams].take, self._seq_len))
        packed = [future.result() for future in itertools.islice(self._ahead, count)]
        own = self._own_sequences(self._sequence)
        domains: Counter[str] = Counter()
        for one in packed:
            self._ahead.popleft()
            self._cursors[next(own) % self._streams] = one.cursor
            domains.update(one.domain_tokens)
        first, self._sequence = self._sequence, self._sequence + sequences
        rows = np.stack([one.tokens for one in packed]) if packed else np.empty((0, self._seq_len), dtype=np.int64)
        return Batch(torch.from_numpy(rows), dict(domains), first)

    def check(self) -> None:
        """Read this rank's next sequence ahead. Raises UserError on bad input."""
        if not self._ahead:
            self._ahead.append(self._reader.submit(self._readers[next(self._own) % self._streams].take, self._seq_len))
        self._ahead[0].result()

    def share(self, first: int, sequences: int, rank: int) -> int:
        """The number of the global sequences [first, first + sequences) that rank `rank` reads."""

        def below(end: int) -> int:
            rounds, rest = divmod(end, self._streams)
            return rounds * len(range(rank, self._streams, self._world_size)) + len(range(rank, rest, self._world_size))

        return below(first + sequences) - below(first)

    def position(self) -> dict[str, Any]:
        """This rank's part of the global position, without what is read ahead. JSON-serialisable.

        `merge_positions` joins the parts.
        """
        return {
            **self._identity,
            "sequence": self._sequence,
            "cursors": {str(stream): list(cursor) for stream, cursor in self._cursors.items()},
        }

    def seek(self, position: dict[str, Any]) -> None:
        """Move to a position from `merge_positions`, saved by any number of ranks.

        No file is opened. The next call of `next` opens the units at the cursors and reads nothing before them. Raises
        UserError if the position was saved with another corpus, tokenizer, seed or number of streams, or if it lacks
        the cursor of one of this rank's streams.
        """
        for name, key in (
            ("corpus", "data.train"),
            ("tokenizer", "parent.path"),
            ("seed", "seed"),
            ("streams", "data.streams"),
        ):
            if position.get(name) != self._identity[name]:
                raise UserError(
                    f"{key}: the run was begun with {name} {position.get(name)}, not {self._identity[name]}; put it "
                    "back, or use another run_dir"
                )
        cursors, sequence = position.get("cursors"), position.get("sequence")
        own: list[Any] = [cursors.get(str(stream)) if isinstance(cursors, dict) else None for stream in self._cursors]
        if type(sequence) is not int or not all(
            isinstance(cursor, list) and len(cursor) == 4 and set(map(type, cursor)) == {int} for cursor in own
        ):
            raise UserError(
                "progress.json of the checkpoint: its data position lacks the cursor of a stream; use another run_dir"
            )
        self._start(sequence, {stream: Cursor(*cursor) for stream, cursor in zip(self._cursors, own, strict=True)})

    @property
    def epoch(self) -> int:
        """The largest epoch, from 0, among the sequences that this rank has returned."""
        return max((cursor.epoch for cursor in self._cursors.values()), default=0)

    @property
    def bad_documents(self) -> dict[str, int]:
        """{reason: documents skipped so far}, reading ahead included. Each document counts once over all epochs."""
        return dict(sum(self._skipped.values(), Counter()))

    def close(self) -> None:
        """Stop the thread that reads ahead."""
        self._closing.set()
        self._reader.shutdown(wait=True, cancel_futures=True)


def merge_positions(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the positions of all ranks into the global one.

    Raises ValueError if they differ in the global sequence or in the corpus, or if a stream is missing.
    """
    cursors = {stream: cursor for part in parts for stream, cursor in part["cursors"].items()}
    merged = {**parts[0], "cursors": dict(sorted(cursors.items(), key=lambda item: int(item[0])))}
    if (
        any({**part, "cursors": None} != {**merged, "cursors": None} for part in parts)
        or len(cursors) != merged["streams"]
    ):
        raise ValueError("these positions are not the parts of one: another global sequence, or streams missing")
    return merged

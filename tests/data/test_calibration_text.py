"""Calibration text: the same on any number of ranks, of the corpus' own documents, and not that with which training
begins."""

from contextlib import closing

import pytest

from plrd_train.data.calibration import calibration_batches
from plrd_train.data.corpus import resolve_corpus
from plrd_train.data.loader import Loader

ORDER = {"seq_len": 16, "streams": 6, "seed": 7, "append_eos": False}


@pytest.fixture
def corpus(tmp_path, write_shard, records):
    for shard in range(3):
        write_shard(tmp_path / "corpus" / f"{shard}.jsonl.zst", records(range(shard * 400, shard * 400 + 400)))
    return resolve_corpus(str(tmp_path / "corpus"), "train")


def calibration(corpus, tokenizer, tokens, world_size):
    """The sequences over all ranks, and the sizes of each rank's batches."""
    shares = [
        calibration_batches(corpus, tokenizer, **ORDER, tokens=tokens, rank=rank, world_size=world_size, batch=4)
        for rank in range(world_size)
    ]
    rows = sorted(tuple(row) for batches in shares for batch in batches for row in batch.tolist())
    return rows, [[len(batch) for batch in batches] for batches in shares]


def test_the_same_sequences_on_any_number_of_ranks(corpus, tokenizer):
    rows, sizes = calibration(corpus, tokenizer, 11 * 16 + 15, 1)
    assert len(rows) == len(set(rows)) == 11 and sizes == [[4, 4, 3]]
    for world_size in (2, 3, 7):
        again, sizes = calibration(corpus, tokenizer, 11 * 16 + 15, world_size)
        assert again == rows
    assert sizes[6] == []  # more ranks than streams: nothing for the last


def test_training_begins_with_other_text(corpus, tokenizer):
    rows, _ = calibration(corpus, tokenizer, 12 * 16, 1)
    with closing(Loader(corpus, tokenizer, **ORDER, rank=0, world_size=1)) as loader:
        training = {tuple(row) for row in loader.next(12).input_ids.tolist()}
    assert not training & set(rows)

"""Calibration text: the sequences from which a data-aware factorizer collects its statistics."""

from contextlib import closing

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from plrd_train.data.corpus import Corpus
from plrd_train.data.loader import Loader

# Added to the seed of the training order. The corpus is then read in a different order, so calibration does not use the
# first text that training reads.
_OTHER_ORDER = 2**63


def calibration_batches(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seq_len: int,
    streams: int,
    seed: int,
    append_eos: bool,
    rank: int,
    world_size: int,
    batch: int,
    skip_bad: bool = False,
) -> list[Tensor]:
    """This rank's share of `tokens` // `seq_len` packed sequences of `corpus`.

    Returns int64 batches (n, seq_len) with n <= `batch`; a rank may get none. All ranks together get the same sequences
    at each call and for any number of ranks. The position of training in the corpus does not change. The other
    arguments are those of `Loader`, whose UserErrors are raised.
    """
    loader = Loader(
        corpus,
        tokenizer,
        seq_len=seq_len,
        streams=streams,
        seed=_OTHER_ORDER + seed,
        append_eos=append_eos,
        rank=rank,
        world_size=world_size,
        skip_bad=skip_bad,
    )
    with closing(loader):
        rows = loader.next(tokens // seq_len).input_ids
    return list(rows.split(batch)) if len(rows) else []

"""The text that a data-aware factorizer looks at before it factors."""

from contextlib import closing

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from plrd_train.data.corpus import Corpus
from plrd_train.data.loader import Loader

# Added to the seed of the training order: another order of the same corpus, whose beginning is text that training comes
# to elsewhere, if at all.
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
    """This rank's share of `tokens` // `seq_len` packed sequences of `corpus`, in batches (n, seq_len) of at most
    `batch`; a rank may get none.

    Over all ranks they are the same sequences on any number of ranks, the same at each call, and training's position in
    the corpus is not touched. The other arguments are those of `Loader`. Raises UserError as that does.
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

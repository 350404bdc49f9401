"""Tokens a second on one core: the loader against what training a parent of 3M parameters takes, and against `datasets`
streaming with tokenization. It needs the test assets (PLRD_ASSETS)."""

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks import Row
from plrd_train.data.corpus import Corpus, resolve_corpus
from plrd_train.data.loader import Loader

ASSETS = Path(os.environ.get("PLRD_ASSETS", "../shared"))
PARENT, CORPUS = ASSETS / "parents" / "stories3m", ASSETS / "data" / "tinystories"
SEQ_LEN, BATCH = 256, 4
SEQUENCES = 4000  # that are read: a million tokens
STEPS = 10  # of training


def rows() -> Iterator[Row]:
    if not PARENT.is_dir():
        print(f"data: no test assets in {ASSETS} (set PLRD_ASSETS)")
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer, corpus = AutoTokenizer.from_pretrained(PARENT), resolve_corpus(str(CORPUS), "train")
    ours = _loader(corpus, tokenizer)
    shape = f"sequences of {SEQ_LEN}"
    yield Row(
        "loader, and training 3M parameters", ours, _training(corpus, tokenizer), "token/s", shape, more_is_better=True
    )
    yield Row(
        "loader, and datasets with map", ours, _datasets(corpus, tokenizer), "token/s", shape, more_is_better=True
    )
    torch.set_num_threads(threads)


def _open(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Loader:
    return Loader(corpus, tokenizer, seq_len=SEQ_LEN, streams=8, seed=0, append_eos=False, rank=0, world_size=1)


def _loader(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> float:
    start = time.perf_counter()
    with closing(_open(corpus, tokenizer)) as loader:
        for _ in range(SEQUENCES // BATCH):
            loader.next(BATCH)
        return SEQUENCES * SEQ_LEN / (time.perf_counter() - start)


def _training(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> float:
    model = AutoModelForCausalLM.from_pretrained(PARENT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    with closing(_open(corpus, tokenizer)) as loader:
        batches = [loader.next(BATCH).input_ids for _ in range(STEPS + 2)]
    for step, ids in enumerate(batches):
        if step == 2:  # what is done once is not counted
            start = time.perf_counter()
        F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return STEPS * BATCH * SEQ_LEN / (time.perf_counter() - start)


def _datasets(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> float:
    """What one does otherwise: a stream of documents, shuffled in a buffer and tokenized in batches; not packed."""
    from datasets import load_dataset

    start, tokens = time.perf_counter(), 0
    stream = load_dataset("json", data_files=list(corpus.shards), split="train", streaming=True).shuffle(
        seed=0, buffer_size=10_000
    )
    ids = stream.map(
        lambda batch: tokenizer(batch["text"], return_attention_mask=False),
        batched=True,
        remove_columns=stream.column_names,
    )
    for document in itertools.chain.from_iterable(itertools.repeat(ids)):
        tokens += len(document["input_ids"])
        if tokens >= SEQUENCES * SEQ_LEN:
            break
    return tokens / (time.perf_counter() - start)

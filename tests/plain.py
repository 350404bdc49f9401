"""What the tests compare with: documents read and perplexity computed without plrd_train, by the contract's
definition."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import zstandard
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def texts(folder: Path) -> Iterator[str]:
    """The texts of all shards below `folder`, in their order."""
    for path in sorted(folder.rglob("*.jsonl*")):
        data = path.read_bytes()
        if path.suffix == ".zst":
            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
        for line in data.splitlines():
            yield json.loads(line)["text"]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, context: int, tokens: int
) -> tuple[float, int]:
    """exp(sum of nll / predicted tokens), and those tokens, over the documents one by one, the first `context` tokens
    of each, at most `tokens`."""
    model.eval()
    nll, predicted = 0.0, 0
    for text in texts(folder):
        ids = torch.tensor([tokenizer(text)["input_ids"][:context]])
        if predicted + ids.shape[1] - 1 > tokens:
            break
        if ids.shape[1] > 1:
            nll += F.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum").item()
            predicted += ids.shape[1] - 1
    return math.exp(nll / predicted), predicted

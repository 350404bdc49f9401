"""A parent and a corpus so small that a whole family takes seconds."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
import zstandard
from tiny_parents import VOCABULARY, config_of, save_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

DOMAINS = ("C4", "Book", "Wikipedia")


def document(number: int) -> str:
    """Words that mostly follow one another in a fixed order, so that there is something to learn. No two documents are
    alike."""
    dice = random.Random(number)
    word, words = dice.randrange(3, VOCABULARY), []
    for _ in range(dice.randint(5, 40)):
        words.append(f"w{word}")
        word = (5 * word + 7) % (VOCABULARY - 3) + 3 if dice.random() < 0.85 else dice.randrange(3, VOCABULARY)
    return " ".join(words)


def lines(numbers: Iterable[int]) -> bytes:
    """These documents as a shard."""
    rows = ({"text": document(i), "meta": {"redpajama_set_name": DOMAINS[i % 3]}} for i in numbers)
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_corpus(folder: Path, shards: int = 3, documents: int = 120) -> None:
    """A corpus in SlimPajama's layout, `documents` in each shard."""
    for i in range(shards):
        path = folder / "train" / "chunk1" / f"example_train_{i}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstandard.ZstdCompressor().compress(lines(range(i * documents, (i + 1) * documents))))
    held_out = folder / "validation" / "chunk1" / "example_holdout_0.jsonl"
    held_out.parent.mkdir(parents=True, exist_ok=True)
    held_out.write_bytes(lines(range(10_000, 10_060)))


def write_parent(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(architecture))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as constants, which would hide mix-ups
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.to(dtype).save_pretrained(folder)
    (save_qwen_tokenizer if architecture == "qwen2" else save_tokenizer)(folder)


def save_qwen_tokenizer(folder: Path) -> None:
    """transformers makes a byte-level BPE of whatever tokenizer.json lies beside a Qwen, so it had better be one: of
    the letters of `document`."""
    vocabulary = {piece: i for i, piece in enumerate(["<|endoftext|>", *"0123456789", "w", "Ġ", "Ġw"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)

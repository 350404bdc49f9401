"""A parent and a corpus so small that a whole family takes seconds, and the command that makes it."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import zstandard
from tiny_parents import CONFIGS, VOCABULARY, save_tokenizer
from transformers import AutoModelForCausalLM

DOMAINS = ("C4", "Book", "Wikipedia")


def document(number: int) -> str:
    """Words that mostly follow one another in a fixed order, so that there is something to learn. No two documents are alike."""
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


def write_parent(folder: Path, architecture: str = "llama") -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture])
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as constants, which would hide mix-ups
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    save_tokenizer(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `parent` and `corpus`, for reading only."""
    folder = tmp_path_factory.mktemp("tiny")
    write_parent(folder / "parent")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="session")
def command(tiny: Path) -> Callable[..., list[str]]:
    """command(run_dir, *overrides): the arguments of a main job of two stages of 20 steps on the tiny parent."""

    def arguments(run_dir: Path, *overrides: str) -> list[str]:
        return [
            "experiment=tinystories",
            f"parent.path={tiny / 'parent'}",
            f"data.train={tiny / 'corpus'}",
            f"data.validation={tiny / 'corpus'}",
            f"run_dir={run_dir}",
            "data.seq_len=16",
            "data.streams=6",
            "stages.ratios=[1.25,1.6]",
            "stages.tokens=2560",
            "recover.global_batch_tokens=128",
            "recover.micro_batch=4",
            "recover.lr=4e-3",
            "tracking.wandb.mode=disabled",
            *overrides,
        ]

    return arguments

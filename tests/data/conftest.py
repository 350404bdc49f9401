"""A tokenizer and small corpora for the data tests, made on the spot."""

import gzip
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import sentencepiece
import zstandard
from transformers import AutoTokenizer, PreTrainedTokenizerBase

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "tree",
    "house",
    "big",
    "red",
    "blue",
    "ran",
    "sat",
    "jumped",
    "looked",
    "at",
    "under",
    "with",
    "and",
    "very",
    "happy",
]


def story(number: int) -> str:
    """A text that no other number has, of 3 to 60 words."""
    words = random.Random(number)
    return f"{number}: " + " ".join(words.choices(WORDS, k=words.randint(3, 60))) + ".\n"


def record(number: int) -> bytes:
    return json.dumps(
        {"text": story(number), "meta": {"redpajama_set_name": ("C4", "Book", "Wikipedia")[number % 3]}}
    ).encode()


@pytest.fixture
def write_shard() -> Callable[[Path, Iterable[bytes]], Path]:
    """write_shard(path, lines): the lines as a shard, compressed by the path's suffix."""

    def write(path: Path, lines: Iterable[bytes]) -> Path:
        data = b"".join(line + b"\n" for line in lines)
        if path.suffix == ".zst":
            data = zstandard.ZstdCompressor(write_checksum=True).compress(data)
        elif path.suffix == ".gz":
            data = gzip.compress(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write


@pytest.fixture(scope="session")
def stories() -> Callable[[int], str]:
    return story


@pytest.fixture(scope="session")
def records() -> Callable[[Iterable[int]], list[bytes]]:
    """records(numbers): the JSON lines of those stories, whose domain is their number modulo 3."""
    return lambda numbers: [record(number) for number in numbers]


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `tokenizer.model` of a Llama-like parent: sentencepiece BPE with byte fallback, BOS in front
    and no EOS."""
    folder = tmp_path_factory.mktemp("parent")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(story(number) for number in range(300)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"add_bos_token": True, "add_eos_token": False, "legacy": False, "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(parent: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(parent)


@pytest.fixture(scope="session")
def reference_ids(parent: Path) -> Callable[[str], list[int]]:
    """The same encoding by sentencepiece itself."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(parent / "tokenizer.model"))
    return lambda text: [pieces.bos_id(), *pieces.encode(text)]

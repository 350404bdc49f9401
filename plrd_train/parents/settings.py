"""The settings of `parent`."""

from typing import Any, Literal

from plrd_train.settings import Positive, Rate, section


@section
class Scratch:
    """Train the parent itself first, from random weights: `architecture` is a Hugging Face config.json, and its
    vocabulary is the tokenizer's."""

    architecture: dict[str, Any]
    # A folder or hub id whose tokenizer it takes; none: a sentencepiece one is trained on the corpus.
    tokenizer: str | None
    vocab_size: Positive  # of the tokenizer that is trained
    tokens: Positive
    lr: Rate


@section
class Parent:
    path: str
    revision: str | None
    trust_remote_code: bool
    # Null: what transformers chooses, sdpa where the architecture has it.
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None
    scratch: Scratch | None

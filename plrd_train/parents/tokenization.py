"""The tokenizer in a folder: its files, and whether AutoTokenizer agrees with tokenizer.json."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from plrd_train.data.corpus import Corpus
from plrd_train.data.documents import sample_of
from plrd_train.errors import UserError

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
_SETTINGS = "tokenizer_config.json"
_OTHER_FILES = (
    _SETTINGS,
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
TOKENIZER_FILES = (*VOCABULARY_FILES, *_OTHER_FILES)
TOKENIZER_CODE = "tokenization*.py"
# This class reads tokenizer.json unchanged.
_PLAIN = "PreTrainedTokenizerFast"
# Texts that expose differences between two tokenizers: kinds of whitespace, digits, scripts, contractions, code, and
# Unicode forms of one letter.
_SAMPLE = (
    "The quick brown fox,  it jumps\tover 1234567 lazy dogs; isn't it? They'LL see: 3.14, 2nd, A1b2.",
    " a space before, and two behind  ",
    "\n\n  def f(x_1):\n\treturn x_1 ** 2 + 10_000  # naïve\r\n",
    "Étude n° 5, cafe\u0301, Übermut; 東京で、Москва, العربية, हिन्दी 🙂👩‍👩‍👧 ﬁ ½ ² Ⅳ\u00a0x\u200by",
    "▁x Ġy ##z https://example.org/a?b=c&d=%20 <b>HTML</b> $E=mc^2$ CamelCaseWords UPPER lower",
)


@dataclass(frozen=True)
class Tokenization:
    """How to read a tokenizer.

    as_stored: read tokenizer.json unchanged, since AutoTokenizer's class would give other tokens. notes: lines for the
    user.
    """

    as_stored: bool = False
    notes: list[str] = field(default_factory=list)


def examine(folder: Path, config: PreTrainedConfig) -> Tokenization:
    """Decide how to read the tokenizer in `folder` for a model of `config`.

    A tokenizer that does not load or encode gets the defaults; `load_tokenizer` reports its error.
    """
    try:
        by_class = load(folder, config, as_stored=False)
        stored = load(folder, config, as_stored=True) if (folder / "tokenizer.json").is_file() else by_class
        as_stored = _tokens(by_class, _SAMPLE) != _tokens(stored, _SAMPLE)
    except Exception:
        return Tokenization()
    notes = []
    if as_stored:
        counts = f"tokenizer.json makes {_count(stored, _SAMPLE)} tokens of a sample of text, {type(by_class).__name__}"
        counts += f" {_count(by_class, _SAMPLE)}: tokenizer.json counts"
        notes.append(f"{counts}, for members too; where AutoTokenizer does not follow it, load them with {_PLAIN}")
    embeddings = config.get_text_config().vocab_size
    if past := past_embeddings(by_class, embeddings):
        shown = ", ".join(past[:3])
        notes.append(
            f"{len(past)} added tokens of the tokenizer have no embedding ({shown}): a text that holds one is refused"
        )
    return Tokenization(as_stored, notes)


def load(
    folder: Path, config: PreTrainedConfig, *, as_stored: bool, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder`: from tokenizer.json if `as_stored`, otherwise by AutoTokenizer for `config`.

    Raises the exceptions of transformers and its tokenizers.
    """
    if as_stored:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return AutoTokenizer.from_pretrained(
        folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True
    )


def compare(tokenizer: PreTrainedTokenizerBase, folder: Path, corpus: Corpus) -> None:
    """Raise UserError if `tokenizer` and the tokenizer.json of its `folder` give different tokens.

    The first documents of `corpus` are compared.
    """
    file = folder / "tokenizer.json"
    if type(tokenizer) is PreTrainedTokenizerFast or not tokenizer.is_fast or not file.is_file():
        return
    stored, texts = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), sample_of(corpus)
    if _tokens(tokenizer, texts) != _tokens(stored, texts):
        counts = (
            f"{_count(stored, texts)} tokens of {len(texts)} documents of the corpus, "
            f"{type(tokenizer).__name__} {_count(tokenizer, texts)}"
        )
        mend = (
            f'set "tokenizer_class": "{_PLAIN}" in {_SETTINGS} for the former, or save the tokenizer again for '
            "the latter"
        )
        raise UserError(f"{file}: makes {counts}; {mend}")


def past_embeddings(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> list[str]:
    """The added tokens without an embedding: their ids are at least `embeddings`, the rows of the model's table."""
    return sorted(token for token, number in tokenizer.get_added_vocab().items() if number >= embeddings)


def copy_tokenizer(source: Path, target: Path, *, as_stored: bool) -> None:
    """Copy the files of a tokenizer into another folder.

    With `as_stored`, the copy's tokenizer_config.json makes AutoTokenizer read tokenizer.json unchanged.
    """
    for pattern in (*TOKENIZER_FILES, TOKENIZER_CODE):
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    if as_stored:
        settings = (
            json.loads((source / _SETTINGS).read_text(encoding="utf-8")) if (source / _SETTINGS).is_file() else {}
        )
        (target / _SETTINGS).write_text(
            json.dumps(settings | {"tokenizer_class": _PLAIN}, indent=2) + "\n", encoding="utf-8"
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens: whether a text gets those differs between tokenizers."""
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]


def _count(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> int:
    return sum(map(len, _tokens(tokenizer, texts)))

"""A folder's tokenizer: its files, and whether AutoTokenizer reads them as tokenizer.json says."""

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
# The class that takes tokenizer.json as it is.
_PLAIN = "PreTrainedTokenizerFast"
# Texts on which tokenizers that differ at all are seen to differ: spaces of all kinds, digits, scripts, contractions,
# code, and forms of one letter.
_SAMPLE = (
    "The quick brown fox,  it jumps\tover 1234567 lazy dogs; isn't it? They'LL see: 3.14, 2nd, A1b2.",
    " a space before, and two behind  ",
    "\n\n  def f(x_1):\n\treturn x_1 ** 2 + 10_000  # naïve\r\n",
    "Étude n° 5, cafe\u0301, Übermut; 東京で、Москва, العربية, हिन्दी 🙂👩‍👩‍👧 ﬁ ½ ² Ⅳ\u00a0x\u200by",
    "▁x Ġy ##z https://example.org/a?b=c&d=%20 <b>HTML</b> $E=mc^2$ CamelCaseWords UPPER lower",
)


@dataclass(frozen=True)
class Tokenization:
    """as_stored: tokenizer.json is read as it is, since AutoTokenizer's class would make other tokens of it. notes:
    lines for the user."""

    as_stored: bool = False
    notes: list[str] = field(default_factory=list)


def examine(folder: Path, config: PreTrainedConfig) -> Tokenization:
    """How the tokenizer in `folder` is to be read, for a model of `config`. One that does not load, or encode, is left
    for its user to tell."""
    try:
        by_class = load(folder, config, as_stored=False)
        stored = load(folder, config, as_stored=True) if (folder / "tokenizer.json").is_file() else by_class
        as_stored = _tokens(by_class, _SAMPLE) != _tokens(stored, _SAMPLE)
    except Exception:
        return Tokenization()
    notes = []
    if as_stored:
        told = f"tokenizer.json makes {_count(stored, _SAMPLE)} tokens of a sample of text, {type(by_class).__name__}"
        told += f" {_count(by_class, _SAMPLE)}: tokenizer.json counts"
        notes.append(f"{told}, for members too; where AutoTokenizer does not follow it, load them with {_PLAIN}")
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
    """The tokenizer in `folder`: as tokenizer.json says where `as_stored`, else as AutoTokenizer reads it for a model
    of `config`. Raises what transformers and its tokenizers raise."""
    if as_stored:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return AutoTokenizer.from_pretrained(
        folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True
    )


def compare(tokenizer: PreTrainedTokenizerBase, folder: Path, corpus: Corpus) -> None:
    """Raise UserError where `tokenizer`, which is of `folder`, makes other tokens of the first documents of `corpus`
    than its tokenizer.json says."""
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
    """The added tokens whose ids lie past the `embeddings` of the model."""
    return sorted(token for token, number in tokenizer.get_added_vocab().items() if number >= embeddings)


def copy_tokenizer(source: Path, target: Path, *, as_stored: bool) -> None:
    """Copy the files of a tokenizer into another folder. Where it is read `as_stored`, AutoTokenizer is told to do so
    there."""
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
    """Special tokens are left out: each tokenizer's own rule says whether a text gets them."""
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]


def _count(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> int:
    return sum(map(len, _tokens(tokenizer, texts)))

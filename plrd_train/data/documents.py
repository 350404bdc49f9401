"""Documents: reading them from a shard, encoding them, and choosing the held-out ones for perplexity."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from plrd_train.data.corpus import Corpus
from plrd_train.data.shards import DAMAGED, READ_ERRORS, open_shard
from plrd_train.errors import UserError

PROBE = (
    "The quick brown fox,  it jumps\tover 1234567 lazy dogs.\n\nÉtude № 5 — naïve café; Übermut, 東京 und Москва 🙂 "
    "<s> </s> x_1 += f(y)\n"
)


@dataclass(frozen=True)
class Document:
    """One text and its domain: SlimPajama's `meta.redpajama_set_name`, "unknown" where there is none."""

    text: str
    domain: str


@dataclass(frozen=True)
class EvalDocument:
    """The token ids of one held-out document, special tokens included, at most `context` of them."""

    ids: list[int]
    domain: str


class UnreadableError(UserError):
    """A shard is missing or cannot be read, perhaps only for now. A second attempt may succeed."""


class _BadLineError(ValueError):
    pass


def read_documents(
    shard: str, *, stripe: int = 0, stripes: int = 1, skip_bad: bool = False, skipped: Counter[str] | None = None
) -> Iterator[Document]:
    """Yield the documents of one shard, in order.

    With `stripes` > 1, only the lines whose index (from 0) is `stripe` modulo `stripes` are read. Documents with an
    empty text are skipped. With `skip_bad`, bad lines and the rest of a damaged shard are skipped too. `skipped` counts
    the skipped documents by reason; the stripes of a shard together count each once.

    Raises UserError, naming shard and line, for a bad line (invalid UTF-8, not a JSON object, no string `text`) or a
    damaged shard, unless `skip_bad`; also if this user may not read the shard. Raises UnreadableError if the shard is
    missing or cannot be read; a second attempt may succeed.
    """
    skipped = Counter() if skipped is None else skipped
    number = 0
    try:
        with open_shard(shard) as lines:
            for number, line in enumerate(lines, 1):
                if (number - 1) % stripes != stripe or line.isspace():
                    continue
                try:
                    document = _parse(line)
                except _BadLineError as error:
                    if not skip_bad:
                        raise UserError(
                            f"{shard}, line {number}: {error}; mend the line, or skip and count bad ones with "
                            "data.skip_bad=true"
                        ) from error
                    skipped[str(error)] += 1
                    continue
                if document.text:
                    yield document
                else:
                    skipped["empty text"] += 1
    except DAMAGED as error:
        if not skip_bad:
            raise UserError(
                f"{shard}: truncated or damaged at line {number + 1}; fetch the shard again, or keep what is whole "
                "with data.skip_bad=true"
            ) from error
        if number % stripes == stripe:
            skipped["truncated or damaged shard"] += 1
    except FileNotFoundError as error:
        raise UnreadableError(
            f"{shard}: this shard is gone since the corpus was listed; put it back, or start anew with another run_dir"
        ) from error
    except PermissionError as error:
        raise UserError(f"{shard}: this user may not read it; change its permissions") from error
    except READ_ERRORS as error:
        raise UnreadableError(f"{shard}: cannot be read ({' '.join(str(error).split())})") from error


def _parse(line: bytes) -> Document:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _BadLineError("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise _BadLineError("not JSON") from None
    if not isinstance(record, dict):
        raise _BadLineError("not a JSON object")
    text = record.get("text")
    if not isinstance(text, str):
        raise _BadLineError("no string under `text`")
    try:
        text.encode()
    except UnicodeEncodeError:  # an escape such as \ud800 passes JSON, but no tokenizer
        raise _BadLineError("a lone surrogate in `text`") from None
    meta = record.get("meta")
    domain = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    return Document(text, domain if isinstance(domain, str) else "unknown")


def limit_ids(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Make `encode` refuse tokens without an embedding: ids of at least `embeddings`, the rows of the table."""
    if max(tokenizer.get_vocab().values(), default=0) >= embeddings:
        tokenizer.embeddings = embeddings


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a whole text, with the special tokens that this tokenizer adds.

    Raises UserError for a token without an embedding (`limit_ids`).
    """
    ids = tokenizer(
        text, add_special_tokens=True, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    embeddings = getattr(tokenizer, "embeddings", None)
    if embeddings is not None and (largest := max(ids, default=0)) >= embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        problem = f"a text holds {token!r}, whose id {largest} lies past the {embeddings} embeddings of the model"
        raise UserError(f"{problem}; take it out of the text, or of the tokenizer's added tokens")
    return ids


@contextmanager
def naming_shard(shard: str) -> Iterator[None]:
    """Prefix the message of a UserError with the name of the shard."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{shard}: {error}") from None


def sample_of(corpus: Corpus, characters: int = 100_000) -> list[str]:
    """The texts of the first documents of a corpus, about `characters` in all.

    The sample ends at a shard that cannot be read. Reading the whole corpus reports that error.
    """
    texts: list[str] = []
    try:
        for shard in corpus.shards:
            for document in read_documents(shard, skip_bad=True):
                texts.append(document.text)
                characters -= len(document.text)
                if characters <= 0:
                    return texts
    except UserError:
        pass
    return texts


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash that identifies what `encode` does: of the vocabulary, and of the ids of a text that exercises it."""
    known = json.dumps([sorted(tokenizer.get_vocab().items()), encode(tokenizer, PROBE)], ensure_ascii=False)
    return hashlib.sha256(known.encode(errors="surrogatepass")).hexdigest()[:16]


def evaluation_documents(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    max_tokens: int,
    skip_bad: bool = False,
    skipped: Counter[str] | None = None,
) -> list[EvalDocument]:
    """Held-out documents in the order of the corpus, each encoded alone and cut to its first `context` tokens.

    Documents of fewer than two tokens are skipped. A document of n tokens predicts n - 1; the list ends before the
    predicted tokens exceed `max_tokens`. `skip_bad` and `skipped` are those of `read_documents`. Raises UserError if no
    document remains, and the errors of `read_documents`.
    """
    chosen: list[EvalDocument] = []
    predicted = 0
    for shard in corpus.shards:
        for document in read_documents(shard, skip_bad=skip_bad, skipped=skipped):
            with naming_shard(shard):
                ids = encode(tokenizer, document.text)[:context]
            if len(ids) < 2:
                continue
            predicted += len(ids) - 1
            if predicted > max_tokens:
                return _not_empty(chosen, corpus, max_tokens)
            chosen.append(EvalDocument(ids, document.domain))
    return _not_empty(chosen, corpus, max_tokens)


def _not_empty(chosen: list[EvalDocument], corpus: Corpus, max_tokens: int) -> list[EvalDocument]:
    if not chosen:
        raise UserError(f"{corpus.spec}: no document of at least two tokens within {max_tokens} tokens to evaluate on")
    return chosen

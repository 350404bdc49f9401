"""The corpus and the tokenizer of the embedded default: real text that every Python installation carries, so that
nothing is downloaded.

The text is the installation's own documentation and library source, under the licence of Python (PSF).
"""

import ast
import hashlib
import importlib
import io
import json
import random
import shutil
import sysconfig
import tokenize
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import sentencepiece
import zstandard

from plrd_train.data.corpus import Corpus, resolve_corpus
from plrd_train.data.documents import read_documents
from plrd_train.errors import UserError

DOCS, SOURCE = "PythonDocs", "PythonSource"
TOPICS = "pydoc_data"  # the language reference in short, as `help("topics")` shows it
MIN_CHARS, TARGET_CHARS, MAX_CHARS = 500, 2000, 8000
TOKENIZER_SAMPLE_BYTES = 3_000_000
# Tests, other people's packages, character tables and what the build wrote about this machine are no library text.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib-dynload", TOPICS}
_BUILD_FILES = ("config-", "_sysconfigdata", "_sysconfig_vars")

Pieces = dict[str, list[str]]  # domain -> documents
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Documented = ast.Module | _Definition


def write_corpus(
    folder: Path, *, train_bytes: int = 6_000_000, validation_bytes: int = 300_000, shards: int = 8, seed: int = 0
) -> None:
    """Write Python's own documentation and library source in SlimPajama's layout, as
    `folder`/{train,validation}/chunk1/example_*.jsonl.zst.

    Sizes are bytes of text, half documentation where there is enough of it; a document has 500 to 8000 characters. A
    module is wholly in train or wholly in validation. The same Python version gives the same documents. `folder`
    appears at once when complete; nothing is done where it exists. Raises UserError where the library's source is not
    on disk.
    """
    if (folder / "train").is_dir():
        return
    modules = _modules(seed)
    validation = _take(modules, validation_bytes, per_module=max(MAX_CHARS, validation_bytes // 16))
    topics = list(_pieces(_topics()))
    train = _take(modules, train_bytes, first={DOCS: topics, SOURCE: []})
    seen = {text for documents in train.values() for text in documents}
    validation = {domain: [text for text in documents if text not in seen] for domain, documents in validation.items()}
    with _atomic_folder(folder) as temporary:
        _write_split(temporary / "train" / "chunk1", "example_train", train, shards, seed)
        _write_split(temporary / "validation" / "chunk1", "example_holdout", validation, 1, seed)


def train_tokenizer(corpus_folder: Path, out: Path, vocab_size: int = 1024) -> None:
    """Train a BPE tokenizer with Llama's settings on a sample of the train shards of `corpus_folder`; `out` then loads
    with AutoTokenizer.

    `out` holds tokenizer.model (unknown 0, BOS 1, EOS 2, no padding, byte fallback; unlike Llama's, no space is put
    before a text) and tokenizer_config.json, and appears at once when complete; nothing is done where it exists. The
    same corpus gives the same bytes. Raises UserError where `corpus_folder` has no readable train shards, or too little
    text for `vocab_size` pieces.
    """
    if (out / "tokenizer.model").is_file():
        return
    sample = list(_sample(resolve_corpus(str(corpus_folder), "train"), TOKENIZER_SAMPLE_BYTES))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            # sentencepiece and transformers disagree on it where a text begins with a space, as source often does
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            character_coverage=0.9999,
            max_sentence_length=4 * MAX_CHARS,  # bytes: whole documents, so that line ends become part of pieces
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:  # sentencepiece's own, a line of its source before the reason
        reason = " ".join(str(error).split()).rpartition("] ")[2]
        raise UserError(
            f"parent.scratch.vocab_size: no tokenizer of {vocab_size} pieces comes out of {corpus_folder} ({reason})"
        ) from None
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
    }
    with _atomic_folder(out) as temporary:
        (temporary / "tokenizer.model").write_bytes(model.getvalue())
        (temporary / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _modules(seed: int) -> Iterator[tuple[str, Pieces]]:
    """Yield (name, documents by domain) of each top-level module or package of the library, in an order that depends on
    names and `seed` alone."""
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _NOT_LIBRARY & set(parts) and not parts[0].startswith(_BUILD_FILES):
            files.setdefault(parts[0].removesuffix(".py"), []).append(path)
    if not files:
        raise UserError(
            f"{root}: holds no library source for the embedded corpus; give data.train and data.validation instead"
        )
    for name in sorted(files, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        pieces: Pieces = {DOCS: [], SOURCE: []}
        for path in files[name]:
            try:
                with tokenize.open(path) as file:
                    text = file.read()
                tree = ast.parse(text)
            except (SyntaxError, UnicodeDecodeError):  # templates and deliberately broken files
                continue
            dotted = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            pieces[DOCS] += _pieces(_docstrings(tree, dotted))
            pieces[SOURCE] += _pieces(_source_blocks(tree, text))
        yield name, pieces


def _take(
    modules: Iterator[tuple[str, Pieces]], budget: int, per_module: int | None = None, first: Pieces | None = None
) -> Pieces:
    """Take whole modules, with at most `per_module` bytes a domain of each, until both domains fill half of `budget`
    bytes or the modules end.

    Source fills up what documentation lacks.
    """
    taken: Pieces = first or {DOCS: [], SOURCE: []}
    sizes = {domain: _size(texts) for domain, texts in taken.items()}
    while min(sizes.values()) < budget // 2 and (module := next(modules, None)) is not None:
        for domain, texts in module[1].items():
            texts = texts if per_module is None else list(_until(texts, per_module))
            taken[domain] += texts
            sizes[domain] += _size(texts)
    docs = list(_until(taken[DOCS], budget // 2))
    return {DOCS: docs, SOURCE: list(_until(taken[SOURCE], budget - _size(docs)))}


def _topics() -> Iterator[str]:
    """Yield the sections of the language reference that pydoc carries; nothing where this installation has been
    stripped of them."""
    try:
        topics = importlib.import_module(f"{TOPICS}.topics").topics
    except ImportError:
        return
    yield from (f"{topics[name].strip()}\n\n" for name in sorted(topics))


def _docstrings(tree: ast.Module, module: str) -> Iterator[str]:
    """Yield "name(arguments)" and docstring of the module, its classes and its functions, in the order of the
    source."""

    def visit(node: _Documented, name: str) -> Iterator[str]:
        if doc := ast.get_docstring(node):
            arguments = (
                f"({ast.unparse(node.args)})" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else ""
            )
            yield f"{name}{arguments}\n\n{doc}\n\n\n"
        for child in node.body:
            if isinstance(child, _Definition):
                yield from visit(child, f"{name}.{child.name}")

    yield from visit(tree, module)


def _source_blocks(tree: ast.Module, text: str) -> Iterator[str]:
    """Yield the source from one function, class or method to the next, without the docstrings (they are in the
    documentation)."""
    lines = text.splitlines(keepends=True)
    starts = {0}
    for node in ast.walk(tree):
        if not isinstance(node, _Documented):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            doc = node.body[0]
            for i in range(doc.lineno - 1, doc.end_lineno or doc.lineno):
                lines[i] = ""
        if isinstance(node, (ast.Module, ast.ClassDef)):
            for child in node.body:
                if isinstance(child, _Definition):
                    start = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)]) - 1
                    # A comment right above belongs to what it describes.
                    while start and lines[start - 1].lstrip().startswith("#"):
                        start -= 1
                    starts.add(start)
    bounds = [*sorted(starts), len(lines)]
    yield from ("".join(lines[a:b]) for a, b in pairwise(bounds))


def _pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Join neighbouring blocks to documents of about TARGET_CHARS, at least MIN_CHARS and at most MAX_CHARS; a shorter
    remainder is dropped."""
    piece = ""
    for block in blocks:
        for part in _split(block, MAX_CHARS - MIN_CHARS):
            if len(piece.strip("\n")) >= MIN_CHARS and len(piece) + len(part) > TARGET_CHARS:
                yield piece.strip("\n")
                piece = ""
            piece = piece.lstrip("\n") + part if piece.strip() else part
    if len(piece.strip("\n")) >= MIN_CHARS:
        yield piece.strip("\n")


def _split(block: str, limit: int) -> Iterator[str]:
    """Split at line ends so that no part is longer than `limit` characters; a single longer line is data, no text, and
    is dropped."""
    part = ""
    for line in block.splitlines(keepends=True):
        if len(part) + len(line) > limit:
            yield part
            part = ""
        if len(line) <= limit:
            part += line
    yield part


def _size(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _until(texts: Iterable[str], budget: int) -> Iterator[str]:
    """Yield texts while their bytes stay within `budget`."""
    for text in texts:
        budget -= len(text.encode())
        if budget < 0:
            return
        yield text


def _write_split(folder: Path, stem: str, pieces: Pieces, shards: int, seed: int) -> None:
    """Write the documents of both domains, shuffled, dealt to `shards` files."""
    documents = [(domain, text) for domain, texts in pieces.items() for text in texts]
    random.Random(seed).shuffle(documents)
    folder.mkdir(parents=True)
    for shard in range(shards):
        with zstandard.open(folder / f"{stem}_{shard}.jsonl.zst", "wt", encoding="utf-8") as file:
            for domain, text in documents[shard::shards]:
                file.write(
                    json.dumps({"text": text, "meta": {"redpajama_set_name": domain}}, ensure_ascii=False) + "\n"
                )


def _sample(corpus: Corpus, budget: int) -> Iterator[str]:
    """Yield documents in pieces of at most MAX_CHARS, the first ones of each shard alike, of up to `budget` bytes in
    all."""
    for shard in corpus.shards:
        for text in _until((document.text for document in read_documents(shard)), budget // len(corpus.shards)):
            yield from (text[i : i + MAX_CHARS] for i in range(0, len(text), MAX_CHARS))


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well and disappears otherwise."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

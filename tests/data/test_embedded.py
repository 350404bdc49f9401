"""The embedded corpus and tokenizer, read with plain zstandard, json, sentencepiece and transformers."""

import ast
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from plrd_train.data import embedded
from plrd_train.data.embedded import train_tokenizer, write_corpus
from plrd_train.errors import UserError

SIZES = {"train": 1_000_000, "validation": 100_000}
DOMAINS = {"PythonDocs", "PythonSource"}


def documents(folder: Path) -> list[dict]:
    found = []
    for path in sorted(folder.rglob("*.jsonl.zst")):
        text = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().decode()
        found += [json.loads(line) for line in text.splitlines()]
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "corpus"
    write_corpus(folder, train_bytes=SIZES["train"], validation_bytes=SIZES["validation"], shards=3)
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(corpus) -> Path:
    folder = corpus.with_name("tokenizer")
    train_tokenizer(corpus, folder, vocab_size=700)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def test_shards_have_slimpajamas_layout(corpus):
    assert sorted(str(path.relative_to(corpus)) for path in corpus.rglob("*") if path.is_file()) == [
        *(f"train/chunk1/example_train_{i}.jsonl.zst" for i in range(3)),
        "validation/chunk1/example_holdout_0.jsonl.zst",
    ]
    for path in corpus.rglob("*.zst"):
        assert len(documents(path.parent)) > 20
    for document in documents(corpus):
        assert set(document) == {"text", "meta"} and set(document["meta"]) == {"redpajama_set_name"}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_sizes_and_domains(corpus, split):
    sizes: dict[str, int] = defaultdict(int)
    for document in documents(corpus / split):
        assert 500 <= len(document["text"]) <= 8000
        sizes[document["meta"]["redpajama_set_name"]] += len(document["text"].encode())
    assert set(sizes) == DOMAINS
    assert 0.9 * SIZES[split] <= sum(sizes.values()) <= SIZES[split]
    assert min(sizes.values()) > 0.3 * SIZES[split]


def test_no_document_and_hardly_a_line_is_in_both_splits(corpus):
    train, validation = ({document["text"] for document in documents(corpus / split)} for split in SIZES)
    assert not train & validation
    assert len(train) == len(documents(corpus / "train"))  # nor twice in one
    lines = [
        {line for text in texts for line in text.splitlines() if len(line.strip()) >= 60}
        for texts in (train, validation)
    ]
    assert len(lines[0] & lines[1]) < 0.02 * len(lines[1])


def test_source_is_real_source_and_docs_are_in_the_docs_alone(corpus):
    texts = defaultdict(list)
    for document in documents(corpus):
        texts[document["meta"]["redpajama_set_name"]].append(document["text"])
    functions = 0
    for text in texts["PythonSource"]:
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a piece may be a part of a class, or a function whose body was its docstring
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                functions += 1
                assert ast.get_docstring(node) is None
    assert functions > 300
    together = "\n".join(texts["PythonDocs"])
    assert "list comprehension" in together and "Return" in together


def test_the_same_python_gives_the_same_corpus_and_another_seed_another(corpus, tmp_path):
    code = (
        "from pathlib import Path; from plrd_train.data.embedded import write_corpus; import sys;"
        f"write_corpus(Path(sys.argv[1]), train_bytes={SIZES['train']}, validation_bytes={SIZES['validation']}, "
        "shards=3)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, tmp_path / "again"], env=environment, check=True, timeout=120)
    assert documents(tmp_path / "again") == documents(corpus)
    write_corpus(tmp_path / "other", train_bytes=50_000, validation_bytes=20_000, shards=1, seed=1)
    assert {d["meta"]["redpajama_set_name"] for d in documents(tmp_path / "other" / "validation")} == DOMAINS
    assert documents(tmp_path / "other" / "validation")[0] not in documents(corpus / "validation")


def test_what_is_there_is_left_alone(corpus, tokenizer_folder):
    before = {path: path.stat().st_mtime_ns for folder in (corpus, tokenizer_folder) for path in folder.rglob("*")}
    write_corpus(corpus, train_bytes=100)
    train_tokenizer(corpus, tokenizer_folder, vocab_size=500)
    assert {
        path: path.stat().st_mtime_ns for folder in (corpus, tokenizer_folder) for path in folder.rglob("*")
    } == before
    assert sorted(path.name for path in corpus.parent.iterdir()) == ["corpus", "tokenizer"]  # nothing temporary is left


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_write_split", stop)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "corpus", train_bytes=50_000, validation_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_python_stripped_of_pydocs_topics(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    write_corpus(tmp_path / "corpus", train_bytes=200_000, validation_bytes=20_000, shards=1)
    found = documents(tmp_path / "corpus" / "train")
    assert {d["meta"]["redpajama_set_name"] for d in found} == DOMAINS
    assert sum(len(d["text"]) for d in found) > 150_000


def test_a_python_without_its_source_is_a_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"data\.train"):
        write_corpus(tmp_path / "corpus")
    with pytest.raises(UserError, match="no shards"):
        train_tokenizer(tmp_path, tmp_path / "tokenizer")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_has_llamas_special_tokens(tokenizer, tokenizer_folder):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    assert len(tokenizer) == pieces.vocab_size() == 700
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token) == (
        0,
        1,
        2,
        None,
    )


@pytest.mark.parametrize("saved", [False, True])
def test_transformers_gives_sentencepieces_ids_with_bos(corpus, tokenizer, tokenizer_folder, tmp_path, saved):
    if saved:  # as a member carries it
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    texts = [document["text"] for document in documents(corpus / "validation")] + [
        "",
        " ",
        "  two",
        "\ttab\n",
        "é 漢字 🐍",
        "def f(x):\n    return x\n",
    ]
    assert tokenizer(texts)["input_ids"] == [[1, *ids] for ids in pieces.encode(texts)]
    assert sum(len(ids) for ids in pieces.encode(texts)) < 0.6 * sum(len(text) for text in texts)


# sentencepiece writes a space as U+2581.
_CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(_CHARACTERS) | st.text("ab \n\t.,(0"))
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_tokenizer_depends_on_its_corpus_alone(corpus, tokenizer_folder, tmp_path):
    train_tokenizer(corpus, tmp_path / "again", vocab_size=700)
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (tokenizer_folder / "tokenizer.model").read_bytes()


def test_a_tokenizer_of_any_corpus_of_this_layout(assets, tmp_path):
    train_tokenizer(assets / "data" / "slimpajama-sample", tmp_path / "tokenizer", vocab_size=1000)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer" / "tokenizer.model"))
    assert pieces.vocab_size() == 1000 and len(pieces.encode("The people of the world")) < 9


@pytest.mark.parametrize("vocab_size", [100, 5_000_000])
def test_an_impossible_vocabulary_is_a_users_mistake(corpus, tmp_path, vocab_size):
    with pytest.raises(UserError, match=f"parent.scratch.vocab_size: no tokenizer of {vocab_size} pieces") as caught:
        train_tokenizer(corpus, tmp_path / "tokenizer", vocab_size)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_damaged_shard_is_named(corpus, tmp_path):
    whole = next((corpus / "train" / "chunk1").iterdir()).read_bytes()
    (tmp_path / "shard.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"shard\.jsonl\.zst: truncated"):
        train_tokenizer(tmp_path, tmp_path / "tokenizer")

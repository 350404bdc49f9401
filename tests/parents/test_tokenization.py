"""Tokenizers: tokenizer.json against what AutoTokenizer makes of it, by the tokenizers library; and tokens without an
embedding."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from plrd_train.data.corpus import resolve_corpus
from plrd_train.data.documents import encode, evaluation_documents
from plrd_train.errors import UserError
from plrd_train.parents.parent import load_tokenizer, open_parent
from plrd_train.parents.tokenization import compare

TEXT = "The quick brown fox jumps over 1234 lazy dogs. It's fine, isn't it? naïve café; x_1 += f(y)\n\n  two  spaces"


def save_bpe(folder: Path, kind: str, settings: dict) -> Tokenizer:
    """A byte-pair encoding whose text is split in that way, saved as tokenizer.json beside config.json."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif kind == "bytes":
        tokenizer.pre_tokenizer = byte_level
    elif kind == "prefix":  # as Llama-2's tokenizer.json has it
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ") if kind == "prefix" else decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        [TEXT] * 9, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=byte_level.alphabet())
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | settings)
    )
    return tokenizer


@pytest.fixture
def with_bpe(save_parent):
    """with_bpe(architecture, kind, **settings) -> (the folder of a parent of that tokenizer, the tokenizer itself)."""

    def make(architecture: str, kind: str, **settings) -> tuple[Path, Tokenizer]:
        folder, model = save_parent(architecture)
        model.resize_token_embeddings(400)
        model.save_pretrained(folder)
        return folder, save_bpe(folder, kind, settings)

    return make


REPLACED = {
    "numbers under Qwen2": ("qwen2", "bytes", {}),
    "bytes under Gemma's class": ("llama", "bytes", {"tokenizer_class": "GemmaTokenizer"}),
    "numbers under Qwen2's class": ("llama", "bytes", {"tokenizer_class": "Qwen2Tokenizer"}),
    "Llama-2's dummy prefix": ("llama", "prefix", {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
}


@pytest.mark.parametrize("case", REPLACED)
def test_tokenizer_json_counts_where_a_class_would_replace_it(with_bpe, case):
    architecture, kind, settings = REPLACED[case]
    folder, stored = with_bpe(architecture, kind, **settings)
    parent = open_parent(str(folder))
    text = " and  a leading space, 1234"
    expected = stored.encode(text, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"] != expected
    assert load_tokenizer(parent)(text, add_special_tokens=False)["input_ids"] == expected
    (note,) = parent.notes
    assert (
        note.startswith("tokenizer.json makes ")
        and " tokens of a sample of text, " in note
        and note.count(": tokenizer.json counts") == 1
    )


@pytest.mark.parametrize("kind", ["bytes", "digits", "prefix"])
def test_nothing_is_said_where_both_agree(with_bpe, kind):
    folder, stored = with_bpe("llama", kind)
    parent = open_parent(str(folder))
    assert parent.notes == [] and not parent.tokenizer_as_stored
    assert (
        load_tokenizer(parent)(TEXT, add_special_tokens=False)["input_ids"]
        == stored.encode(TEXT, add_special_tokens=False).ids
    )


def test_autotokenizer_reads_a_member_as_its_parent_was_read(with_bpe, plrd_json, tmp_path):
    folder, stored = with_bpe("llama", "bytes", tokenizer_class="GemmaTokenizer")
    plrd_json("factor", folder, tmp_path / "out", "--method", "svd", "--ratio", "1.5")
    member = tmp_path / "out/members/1.5x"
    for tokenizer in (AutoTokenizer.from_pretrained(member), load_tokenizer(open_parent(str(member)))):
        assert (
            tokenizer(TEXT, add_special_tokens=False)["input_ids"] == stored.encode(TEXT, add_special_tokens=False).ids
        )
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_what_only_the_corpus_shows_is_refused_with_both_counts(with_bpe, tmp_path, monkeypatch):
    folder, _ = with_bpe("llama", "prefix", tokenizer_class="LlamaTokenizer", legacy=False)
    monkeypatch.setattr("plrd_train.parents.tokenization._SAMPLE", ("the quick fox",))  # on which the two agree
    parent = open_parent(str(folder))
    assert not parent.tokenizer_as_stored
    texts = ["the quick fox", " a leading space", "another"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer, stored = load_tokenizer(parent), Tokenizer.from_file(str(folder / "tokenizer.json"))
    counts = [
        sum(len(stored.encode(text).ids) for text in texts),
        sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts),
    ]
    with pytest.raises(
        UserError,
        match=rf"tokenizer\.json: makes {counts[0]} tokens of 3 documents of the corpus, LlamaTokenizer {counts[1]};",
    ):
        compare(tokenizer, folder, resolve_corpus(str(tmp_path / "text.jsonl"), "train"))


# Tokens without an embedding


@pytest.fixture
def with_added(save_parent):
    """A parent whose tokenizer knows a token <pad> that was added behind the embeddings."""
    folder, _ = save_parent("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_an_added_token_without_embedding_is_told_and_refused_where_a_text_holds_it(with_added, plrd, tmp_path):
    parent = open_parent(str(with_added))
    assert parent.notes == [
        "2 added tokens of the tokenizer have no embedding (<image>, <pad>): a text that holds one is refused"
    ]
    tokenizer = load_tokenizer(parent)
    assert max(encode(tokenizer, "w3 w4 w63")) < 64
    with pytest.raises(
        UserError, match=r"a text holds '<image>', whose id 65 lies past the 64 embeddings of the model; take it out"
    ):
        encode(tokenizer, "w3 <image> w4")
    shard = tmp_path / "text.jsonl"
    shard.write_text(json.dumps({"text": "w3 w4 w5"}) + "\n")
    assert len(evaluation_documents(resolve_corpus(str(shard), "validation"), tokenizer, 256, 1000)) == 1
    status, out, err = plrd("evaluate", with_added, "--data", shard, "--json")
    assert (status, err.count("2 added tokens")) == (0, 1) and json.loads(out)["nll_tokens"] == 2
    shard.write_text(shard.read_text() + json.dumps({"text": "w3 <pad> w5"}) + "\n")
    status, _, err = plrd("evaluate", with_added, "--data", shard)
    assert status == 2 and "Traceback" not in err
    assert f"error: {shard}: a text holds '<pad>', whose id 64 lies past the 64 embeddings" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "more", "told"),
    [
        ("w3 <image> w5", (), "train.jsonl: a text holds '<image>'"),
        (
            "w3 w4 w5",
            ("data.append_eos=true",),
            "data.append_eos=true, but the model has no embedding for the EOS token",
        ),
    ],
)
def test_in_training_text_too(with_added, plrd, tmp_path, text, more, told):
    if more:
        file = with_added / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<pad>"}))
    shard = tmp_path / "train.jsonl"
    shard.write_text((json.dumps({"text": text}) + "\n") * 30)
    short = ("data.seq_len=8", "data.streams=1", "factorizer.calibration_tokens=64", *more)
    status, _, err = plrd(
        "factor", with_added, tmp_path / "out", "--method", "whitened", "--ratio", "1.5", "--calibration", shard, *short
    )
    assert status == 2 and told in err.splitlines()[-1] and "Traceback" not in err


def test_a_vocabulary_that_is_too_large_is_of_another_model(save_parent):
    folder, model = save_parent("llama")
    model.resize_token_embeddings(40)
    model.save_pretrained(folder)
    with pytest.raises(
        UserError, match=r"its tokenizer has the id 63, but config\.json a vocab_size of 40; they are not of one model"
    ):
        load_tokenizer(open_parent(str(folder)))

"""Reading shards, bad input included, and the documents that perplexity is measured on."""

import gzip
import json
from collections import Counter

import pytest
import sentencepiece
import zstandard
from transformers import AutoTokenizer

from plrd_train.data.corpus import resolve_corpus
from plrd_train.data.documents import encode, evaluation_documents, read_documents
from plrd_train.errors import UserError

BAD_LINES = {
    "invalid UTF-8": b'{"text": "caf\xe9"}',
    "not JSON": b'{"text": "no end',
    "not a JSON object": b'["text"]',
    "no string under `text`": b'{"meta": {"redpajama_set_name": "C4"}}',
    "a lone surrogate in `text`": b'{"text": "half \\ud83d"}',
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_documents_come_in_order_with_their_domain(tmp_path, write_shard, stories, records, suffix):
    shard = write_shard(tmp_path / f"a{suffix}", records(range(200)))
    documents = list(read_documents(str(shard)))
    assert [d.text for d in documents] == [stories(n) for n in range(200)]
    assert [d.domain for d in documents[:4]] == ["C4", "Book", "Wikipedia", "C4"]


def test_domain_is_unknown_where_it_is_not_named(tmp_path, write_shard):
    lines = [
        b'{"text": "a"}',
        b'{"text": "b", "meta": null}',
        b'{"text": "c", "meta": {"redpajama_set_name": 3}}',
        b'\xef\xbb\xbf{"text": "d"}\r',
        b"",
        b" ",
    ]
    assert [(d.text, d.domain) for d in read_documents(str(write_shard(tmp_path / "a.jsonl", lines)))] == [
        (t, "unknown") for t in "abcd"
    ]


def test_several_zstd_frames_are_one_shard(tmp_path, stories, records):
    lines = records(range(60))
    # As pzstd writes in front of each frame.
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"any"
    frames = [zstandard.compress(b"".join(line + b"\n" for line in lines[i : i + 20])) for i in (0, 20, 40)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(skippable + frame for frame in frames))
    assert [d.text for d in read_documents(str(tmp_path / "a.jsonl.zst"))] == [stories(n) for n in range(60)]


@pytest.mark.parametrize("stripes", [2, 3, 7])
def test_stripes_share_out_the_documents(tmp_path, write_shard, stories, records, stripes):
    shard = str(write_shard(tmp_path / "a.jsonl.zst", records(range(50))))
    for stripe in range(stripes):
        assert [d.text for d in read_documents(shard, stripe=stripe, stripes=stripes)] == [
            stories(n) for n in range(stripe, 50, stripes)
        ]


@pytest.mark.parametrize(("reason", "line"), BAD_LINES.items())
def test_a_bad_line_is_named_by_shard_and_number(tmp_path, write_shard, records, reason, line):
    good = records(range(5))
    shard = str(write_shard(tmp_path / "a.jsonl.zst", [*good[:2], line, *good[2:]]))
    with pytest.raises(UserError) as error:
        list(read_documents(shard))
    assert f"{shard}, line 3: {reason}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stripes", [1, 3])
def test_bad_lines_can_be_skipped_and_are_counted_once(tmp_path, write_shard, stories, records, stripes):
    good = records(range(10))
    shard = str(
        write_shard(
            tmp_path / "a.jsonl.zst",
            [*good[:4], *BAD_LINES.values(), b'{"text": ""}', *good[4:], BAD_LINES["not JSON"]],
        )
    )
    skipped: Counter[str] = Counter()
    texts = [
        d.text
        for s in range(stripes)
        for d in read_documents(shard, stripe=s, stripes=stripes, skip_bad=True, skipped=skipped)
    ]
    assert sorted(texts) == sorted(stories(n) for n in range(10))
    assert skipped == {**dict.fromkeys(BAD_LINES, 1), "not JSON": 2, "empty text": 1}


@pytest.mark.parametrize(
    ("suffix", "kept"),
    [(".jsonl.zst", 0), *((s, k) for s in (".jsonl.zst", ".jsonl.gz") for k in (3, 10, 0.2, 0.6, -1))],
)
def test_a_truncated_shard_is_refused_or_read_up_to_the_cut(tmp_path, stories, records, suffix, kept):
    data = b"".join(line + b"\n" for line in records(range(5000)))
    data = (
        zstandard.ZstdCompressor(write_checksum=True).compress(data) if suffix == ".jsonl.zst" else gzip.compress(data)
    )
    cut = int(kept * len(data)) if isinstance(kept, float) else kept
    shard = tmp_path / f"a{suffix}"
    shard.write_bytes(data[:cut])
    with pytest.raises(UserError, match=r"a\.jsonl\.\w+: truncated or damaged at line \d+; .*skip_bad"):
        list(read_documents(str(shard)))
    for stripes in (1, 4):
        skipped: Counter[str] = Counter()
        texts = [
            [d.text for d in read_documents(str(shard), stripe=s, stripes=stripes, skip_bad=True, skipped=skipped)]
            for s in range(stripes)
        ]
        count = sum(map(len, texts))
        assert texts == [[stories(n) for n in range(s, count, stripes)] for s in range(stripes)]
        assert (count > 500) == (kept in (0.2, 0.6, -1))
        assert skipped == {"truncated or damaged shard": 1}


def test_damage_in_the_middle_is_refused(tmp_path, write_shard, records):
    shard = write_shard(tmp_path / "a.jsonl.zst", records(range(500)))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(UserError, match=str(shard)):
        list(read_documents(str(shard)))


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_shard_that_is_gone_is_always_an_error(tmp_path, skip_bad):
    with pytest.raises(UserError, match=r"gone\.jsonl: this shard is gone"):
        list(read_documents(str(tmp_path / "gone.jsonl"), skip_bad=skip_bad))


def test_evaluation_documents_are_cut_and_counted_one_by_one(
    tmp_path, write_shard, stories, records, tokenizer, reference_ids
):
    write_shard(tmp_path / "b.jsonl.zst", [b'{"text": ""}', *records(range(30, 60))])
    write_shard(tmp_path / "a.jsonl.zst", records(range(30)))
    corpus = resolve_corpus(str(tmp_path), "validation")
    expected = [reference_ids(stories(n))[:40] for n in range(60)]
    for number in (1, 17, 45, 60):
        budget = sum(len(ids) - 1 for ids in expected[:number])
        chosen = evaluation_documents(corpus, tokenizer, context=40, max_tokens=budget)
        assert [d.ids for d in chosen] == expected[:number]
        assert (
            len(evaluation_documents(corpus, tokenizer, context=40, max_tokens=budget - 1)) == number - 1
            if number > 1
            else True
        )
    assert {len(ids) for ids in expected} > {40} and [d.domain for d in chosen[:3]] == ["C4", "Book", "Wikipedia"]


def test_an_evaluation_without_a_document_is_refused(tmp_path, write_shard, records, tokenizer):
    corpus = resolve_corpus(str(write_shard(tmp_path / "a.jsonl", records([1]))), "validation")
    with pytest.raises(UserError, match="no document of at least two tokens within 2 tokens"):
        evaluation_documents(corpus, tokenizer, context=40, max_tokens=2)


def test_a_real_parent_s_documents_are_those_of_sentencepiece(assets):
    folder = assets / "parents" / "stories260k"
    corpus = resolve_corpus(str(assets / "data" / "tinystories"), "validation")
    documents = evaluation_documents(corpus, AutoTokenizer.from_pretrained(folder), context=256, max_tokens=20_000)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    with zstandard.open(corpus.shards[0], "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, documents, strict=False)]
    assert [d.ids for d in documents] == [[pieces.bos_id(), *pieces.encode(text)][:256] for text in texts]
    assert 19_500 < sum(len(d.ids) - 1 for d in documents) <= 20_000


def test_a_text_longer_than_the_tokenizer_s_maximum_is_encoded_whole_and_silently(
    tokenizer, reference_ids, stories, caplog
):
    text = "".join(stories(n) for n in range(50))
    assert (
        encode(tokenizer, text) == reference_ids(text)
        and len(encode(tokenizer, text)) > 10 * tokenizer.model_max_length
    )
    assert not caplog.records

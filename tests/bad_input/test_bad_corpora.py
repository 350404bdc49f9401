"""Malformed corpora, read to evaluate on; and the same bytes at random, against what the generator of them knows."""

import gzip
import json
from collections import Counter
from pathlib import Path

import bad_corpora
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import bad

from plrd_train.data.documents import read_documents
from plrd_train.errors import UserError


@pytest.mark.parametrize("name", bad_corpora.LINES)
def test_a_malformed_line_is_refused_or_skipped_and_counted(name, sound, spoiled, refused, plrd):
    content, reason = bad_corpora.LINES[name]
    corpus = spoiled("corpus", bad(bad_corpora.line(content)))
    evaluate = ("evaluate", sound / "parent", "--data", corpus, "--tokens", "100")
    refused((bad_corpora.PLACE, reason), *evaluate)
    status, out, err = plrd(*evaluate, "--skip-bad")
    assert (status, err) == (0, "")
    assert "passed over 1 of: " in out and reason in out and "perplexity" in out


@pytest.mark.parametrize("name", bad_corpora.SHARDS)
def test_a_malformed_corpus_is_refused(name, sound, spoiled, refused):
    case = bad_corpora.SHARDS[name]
    refused(case.named, "evaluate", sound / "parent", "--data", spoiled("corpus", case))


GOOD = st.builds(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode(), st.text("abc é東", min_size=1))
BAD = st.one_of(
    st.binary(max_size=40).map(lambda data: b"{" + data.replace(b"\n", b"").replace(b"}", b"")),
    st.sampled_from(
        [content for content, _ in bad_corpora.LINES.values() if len(content) < 1000 and b"\n" not in content]
    ),
    st.recursive(st.none() | st.booleans() | st.integers(), lambda part: st.lists(part, max_size=3)).map(
        lambda value: json.dumps(value).encode()
    ),
)
PACK = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
SLOWLY = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@SLOWLY
@given(
    lines=st.lists(st.tuples(st.booleans(), GOOD, BAD), max_size=12),
    suffix=st.sampled_from(sorted(PACK)),
    stripes=st.integers(1, 3),
)
def test_bad_lines_at_random_are_counted_exactly(tmp_path, lines, suffix, stripes):
    shard = tmp_path / f"a{suffix}"
    shard.write_bytes(PACK[suffix](b"".join((good if is_good else wrong) + b"\n" for is_good, good, wrong in lines)))
    skipped = Counter[str]()
    read = [
        document.text
        for stripe in range(stripes)
        for document in read_documents(str(shard), stripe=stripe, stripes=stripes, skip_bad=True, skipped=skipped)
    ]
    assert sorted(read) == sorted(json.loads(good)["text"] for is_good, good, _ in lines if is_good)
    assert skipped.total() == sum(not is_good for is_good, _, _ in lines)
    first = next((number for number, (is_good, _, _) in enumerate(lines, 1) if not is_good), None)
    if first is not None:
        with pytest.raises(UserError, match=f"line {first}: ") as error:
            list(read_documents(str(shard)))
        assert "\n" not in str(error.value)


@SLOWLY
@given(
    suffix=st.sampled_from([".jsonl.gz", ".jsonl.zst"]),
    cut=st.booleans(),
    at=st.floats(0, 1, exclude_max=True),
    mask=st.integers(1, 255),
)
def test_a_shard_that_is_cut_or_flipped_at_random(tmp_path, suffix, cut, at, mask):
    texts = [f"w{i} " * (i % 7 + 1) for i in range(200)]
    whole = PACK[suffix](b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))
    place = int(at * len(whole))
    shard = Path(tmp_path / f"a{suffix}")
    shard.write_bytes(whole[:place] if cut else whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
    skipped = Counter[str]()
    kept = [document.text for document in read_documents(str(shard), skip_bad=True, skipped=skipped)]
    if kept == texts and not skipped:  # a flag or a date in a header that means nothing to the text
        return
    assert skipped.total() >= 1 or not kept
    if place or not cut:
        with pytest.raises(UserError) as error:
            list(read_documents(str(shard)))
        assert str(shard) in str(error.value) and "\n" not in str(error.value)

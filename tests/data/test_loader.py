"""The order of training sequences: the same on any number of ranks, after any restart, and made of the corpus' own
documents."""

import contextlib
import copy
import itertools
import json
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plrd_train.data.corpus import resolve_corpus
from plrd_train.data.documents import encode
from plrd_train.data.loader import Loader, merge_positions
from plrd_train.errors import UserError

SEQ_LEN, STREAMS = 48, 6
BATCHES = (5, 4, 4, 7, 1, 11)  # global sequences a call, deliberately no multiple of streams or ranks


@pytest.fixture
def many_shards(tmp_path, write_shard, records):
    """15 shards of 4 to 11 documents: more shards than streams, and no multiple of them."""
    first = 0
    for shard in range(15):
        write_shard(tmp_path / "many" / f"{shard:02}.jsonl.zst", records(range(first, first + 4 + shard % 8)))
        first += 4 + shard % 8
    return resolve_corpus(str(tmp_path / "many"), "train")


@pytest.fixture
def few_shards(tmp_path, write_shard, records):
    for shard in range(2):
        write_shard(tmp_path / "few" / f"{shard}.jsonl.zst", records(range(shard * 50, shard * 50 + 47)))
    return resolve_corpus(str(tmp_path / "few"), "train")


@contextlib.contextmanager
def ranks(corpus, tokenizer, world_size, position=None, **changed):
    """The loaders of all ranks, standing at `position`."""
    settings = {"seq_len": SEQ_LEN, "streams": STREAMS, "seed": 7, "append_eos": False, **changed}
    loaders = [Loader(corpus, tokenizer, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    try:
        for loader in loaders:
            if position is not None:
                loader.seek(position)
        yield loaders
    finally:
        for loader in loaders:
            loader.close()


def read(loaders, batches, streams=STREAMS):
    """The global sequences in global order, put together from what each rank is due by the rule: stream i mod S, rank
    stream mod world size."""
    sequences = []
    for count in batches:
        shares = [loader.next(count) for loader in loaders]
        rows = [iter(share.input_ids.tolist()) for share in shares]
        assert len({share.first for share in shares}) == 1
        sequences += [
            tuple(next(rows[i % streams % len(loaders)])) for i in range(shares[0].first, shares[0].first + count)
        ]
        assert all(next(row, None) is None for row in rows)
    return sequences


def position_of(loaders):
    return json.loads(json.dumps(merge_positions([loader.position() for loader in loaders])))


def split_documents(tokens, bos):
    """The documents in a run of tokens: each begins with BOS."""
    starts = [i for i, token in enumerate(tokens) if token == bos]
    return [tuple(tokens[a:b]) for a, b in itertools.pairwise([*starts, len(tokens)])]


def streams_of(sequences, streams=STREAMS):
    return [list(itertools.chain(*sequences[stream::streams])) for stream in range(streams)]


@pytest.mark.parametrize("corpus_name", ["many_shards", "few_shards"])
def test_the_order_is_the_same_on_any_number_of_ranks_and_for_any_batch_size(request, tokenizer, corpus_name):
    corpus = request.getfixturevalue(corpus_name)
    with ranks(corpus, tokenizer, 1) as loaders:
        expected = read(loaders, BATCHES)
        end = position_of(loaders)
    assert len(expected) == sum(BATCHES) and all(len(sequence) == SEQ_LEN for sequence in expected)
    for world_size in (2, 3, 4, 8):  # with 8 ranks two have no stream at all
        with ranks(corpus, tokenizer, world_size) as loaders:
            assert read(loaders, BATCHES) == expected
            assert position_of(loaders) == end
    with ranks(corpus, tokenizer, 2) as loaders:
        assert read(loaders, [1] * sum(BATCHES)) == expected
        assert position_of(loaders) == end


@pytest.mark.parametrize("corpus_name", ["many_shards", "few_shards"])
def test_an_epoch_is_every_document_once_and_the_next_has_another_order(
    request, tokenizer, stories, reference_ids, corpus_name
):
    corpus = request.getfixturevalue(corpus_name)
    numbers = range(109) if corpus_name == "many_shards" else [*range(47), *range(50, 97)]
    expected = Counter(tuple(reference_ids(stories(n))) for n in numbers)
    first, second = [], []
    with ranks(corpus, tokenizer, 1) as (loader,):
        for tokens in streams_of(read([loader], [240] * 2)):
            documents = split_documents(tokens, tokenizer.bos_token_id)[:-1]  # the last may be cut
            length = next(
                i
                for i, document in enumerate(documents[1:], 1)
                if document == documents[0] or documents[i] in documents[:i]
            )
            assert len(documents) >= 2 * length  # two whole epochs were read
            first.append(documents[:length])
            second.append(documents[length : 2 * length])
            assert sorted(first[-1]) == sorted(second[-1])
            assert set(documents[2 * length :]) <= set(first[-1])
        assert loader.epoch >= 1
    assert Counter(itertools.chain(*first)) == expected
    assert sum(a != b for a, b in zip(first, second, strict=True)) >= STREAMS - 1
    assert first != [sorted(documents) for documents in first]


def test_one_stream_of_one_shard_is_its_documents_end_to_end(
    tmp_path, write_shard, records, stories, reference_ids, tokenizer
):
    corpus = resolve_corpus(str(write_shard(tmp_path / "a.jsonl.zst", records(range(30)))), "train")
    expected = [tuple(reference_ids(stories(n))) for n in range(30)]
    length = sum(map(len, expected))
    with ranks(corpus, tokenizer, 1, streams=1) as (loader,):
        epochs = []
        tokens = list(itertools.chain(*read([loader], [length // SEQ_LEN + 1], streams=1)))
        assert loader.epoch == 1
        tokens += itertools.chain(*read([loader], [2 * length // SEQ_LEN], streams=1))
        assert loader.epoch == 2 + (len(tokens) > 3 * length) and loader.position()["cursors"]["0"][0] == loader.epoch
        for start in (0, length):
            epochs.append(split_documents(tokens[start : start + length], tokenizer.bos_token_id))
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(expected)
    assert epochs[0] != epochs[1] and expected not in epochs


def test_another_seed_gives_another_order(many_shards, tokenizer):
    found = []
    for seed in (7, 7, 8, 2**40):
        with ranks(many_shards, tokenizer, 1, seed=seed) as loaders:
            found.append(read(loaders, [12]))
    assert found[0] == found[1] and len({tuple(one) for one in found}) == 3


def test_tokens_are_counted_by_domain(tmp_path, write_shard, records, stories, reference_ids, tokenizer):
    corpus = resolve_corpus(str(write_shard(tmp_path / "a.jsonl.zst", records(range(30)))), "train")
    expected = Counter()
    for n in range(30):
        expected[("C4", "Book", "Wikipedia")[n % 3]] += len(reference_ids(stories(n)))
    with ranks(corpus, tokenizer, 1, streams=1, seq_len=expected.total()) as (loader,):
        batch = loader.next(2)  # two sequences of one epoch each
    assert batch.domain_tokens == {domain: 2 * count for domain, count in expected.items()}
    assert batch.input_ids.shape == (2, expected.total()) and batch.input_ids.dtype == torch.int64


def test_eos_follows_each_document_only_if_asked_for(many_shards, tokenizer, stories, reference_ids):
    eos, documents = tokenizer.eos_token_id, {(*reference_ids(stories(n)), tokenizer.eos_token_id) for n in range(109)}
    with ranks(many_shards, tokenizer, 1, append_eos=True) as loaders:
        for tokens in streams_of(read(loaders, [30])):
            assert set(split_documents(tokens, tokenizer.bos_token_id)[:-1]) <= documents
    with ranks(many_shards, tokenizer, 1) as loaders:
        assert eos not in set(itertools.chain(*read(loaders, [30])))


def test_eos_is_not_doubled_and_not_invented(many_shards, parent, tokenizer):
    own_rule = AutoTokenizer.from_pretrained(parent, add_eos_token=True)
    assert own_rule("the cat").input_ids[-1] == own_rule.eos_token_id
    with (
        ranks(many_shards, own_rule, 1, append_eos=True) as one,
        ranks(many_shards, tokenizer, 1, append_eos=True) as other,
    ):
        assert read(one, [20]) == read(other, [20])
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match=r"data\.append_eos=true.*no EOS"):
        Loader(many_shards, without, seq_len=8, streams=2, seed=0, append_eos=True, rank=0, world_size=1)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 3), (3, 2), (2, 8)])
@pytest.mark.parametrize("corpus_name", ["many_shards", "few_shards"])
def test_a_saved_position_goes_on_as_if_nothing_had_happened(request, tokenizer, corpus_name, before, after):
    corpus = request.getfixturevalue(corpus_name)
    with ranks(corpus, tokenizer, 1) as loaders:
        expected = read(loaders, [400])
        end = position_of(loaders)
    for stop in (0, 3, 20, 290):  # 290 lies in a later epoch
        with ranks(corpus, tokenizer, before) as loaders:
            assert read(loaders, [stop]) == expected[:stop]
            saved = position_of(loaders)
        cursors = saved["cursors"].values()
        assert stop < 20 or any(offset > 0 for *_, offset in cursors)  # in mid-document
        assert stop < 290 or any(epoch > 0 for epoch, *_ in cursors)
        with ranks(corpus, tokenizer, after, saved) as loaders:
            assert position_of(loaders) == saved
            assert read(loaders, [7, 400 - stop - 7]) == expected[stop:]
            assert position_of(loaders) == end


def test_a_loader_in_use_can_seek_back_and_forth(many_shards, tokenizer):
    with ranks(many_shards, tokenizer, 2) as loaders:
        start = position_of(loaders)
        expected = read(loaders, [9, 9])
        middle = position_of(loaders)
        rest = read(loaders, [9])
        for position, sequences in ((start, expected), (middle, rest), (start, expected + rest)):
            for loader in loaders:
                loader.seek(position)
            assert read(loaders, [len(sequences)]) == sequences


def test_shares_are_the_sequences_of_a_rank_s_streams(many_shards, tokenizer):
    for streams, world_size in ((6, 1), (6, 4), (5, 2), (3, 7)):
        with ranks(many_shards, tokenizer, world_size, streams=streams) as loaders:
            for first, count in itertools.product((0, 1, 5, 23), (0, 1, 4, 17)):
                owners = Counter(i % streams % world_size for i in range(first, first + count))
                for rank in range(world_size):
                    assert loaders[0].share(first, count, rank) == loaders[-1].share(first, count, rank) == owners[rank]


def test_a_rank_may_have_nothing_to_do(few_shards, tokenizer):
    with ranks(few_shards, tokenizer, 3) as loaders:
        batches = [loader.next(1) for loader in loaders]
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(1, SEQ_LEN), (0, SEQ_LEN), (0, SEQ_LEN)]
    assert batches[2].domain_tokens == {} and batches[2].input_ids.dtype == torch.int64


def test_too_few_documents_for_the_streams_is_said(tmp_path, write_shard, records, tokenizer):
    corpus = resolve_corpus(str(write_shard(tmp_path / "a.jsonl", [*records(range(3)), b'{"text": ""}'])), "train")
    with ranks(corpus, tokenizer, 1, streams=3) as loaders:
        assert len(read(loaders, [30], streams=3)) == 30
    with (
        ranks(corpus, tokenizer, 1, streams=4) as (loader,),
        pytest.raises(UserError, match=r"a\.jsonl.*too few documents.*data\.streams"),
    ):
        loader.next(4)


def test_a_position_of_something_else_is_refused(many_shards, few_shards, tokenizer):
    with ranks(many_shards, tokenizer, 1) as loaders:
        saved = position_of(loaders)
    for corpus, changed, named in (
        (few_shards, {}, "corpus"),
        (many_shards, {"seed": 8}, "seed 7, not 8"),
        (many_shards, {"streams": 4}, "streams 6, not 4"),
    ):
        with ranks(corpus, tokenizer, 1, **changed) as (loader,), pytest.raises(UserError, match=named):
            loader.seek(saved)
    bare = copy.deepcopy(tokenizer)
    bare.add_bos_token = False
    for other in (with_one_more_token(tokenizer), bare):
        assert encode(other, "the cat") != encode(tokenizer, "the cat") or len(other) != len(tokenizer)
        with (
            ranks(many_shards, other, 1) as (loader,),
            pytest.raises(UserError, match=r"parent\.path: the run was begun with tokenizer"),
        ):
            loader.seek(saved)


def with_one_more_token(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["an unheard-of word"])
    return other


def test_parts_of_different_positions_do_not_merge(many_shards, tokenizer):
    with ranks(many_shards, tokenizer, 2) as loaders:
        parts = [loader.position() for loader in loaders]
        loaders[1].next(3)
        for wrong in (parts[:1], [parts[0], loaders[1].position()]):
            with pytest.raises(ValueError, match="not the parts of one"):
                merge_positions(wrong)


def test_bad_input_is_raised_by_the_call_that_needs_it_and_the_position_stays(
    tmp_path, write_shard, records, tokenizer
):
    good = records(range(60))
    write_shard(tmp_path / "a.jsonl.zst", good[:30])
    bad = write_shard(tmp_path / "b.jsonl.zst", [*good[30:40], b"no json", *good[40:]])
    corpus = resolve_corpus(str(tmp_path), "train")
    with ranks(corpus, tokenizer, 1, streams=1) as (loader,):
        sequences, saved = [], loader.position()
        with contextlib.suppress(UserError):
            while len(sequences) < 1000:
                sequences += read([loader], [1], streams=1)
                saved = loader.position()
        assert 0 < len(sequences) < 1000 and saved["sequence"] == len(sequences)
        for _ in range(2):  # and again, as the call that failed took nothing
            with pytest.raises(UserError, match=f"{bad}, line 11: not JSON"):
                loader.next(1)
            assert loader.position() == saved
    write_shard(bad, [*good[30:40], good[40], *good[40:]])  # the user mends the line, not changing the number of lines
    with ranks(corpus, tokenizer, 1, streams=1) as (loader,):
        assert read([loader], [len(sequences)], streams=1) == sequences
        assert loader.position() == saved


def test_a_shard_that_is_away_for_a_while_costs_nothing_but_time(
    tmp_path, write_shard, records, tokenizer, monkeypatch, capfd
):
    monkeypatch.setattr("plrd_train.data.loader.WAITS_S", (0.2, 5.0))
    shard, away = write_shard(tmp_path / "corpus" / "a.jsonl", records(range(30))), tmp_path / "away"
    corpus = resolve_corpus(str(tmp_path / "corpus"), "train")
    with ranks(corpus, tokenizer, 1) as loaders:
        expected = read(loaders, [4])
    shard.rename(away)
    with ranks(corpus, tokenizer, 1) as loaders:
        back = threading.Timer(0.1, lambda: away.rename(shard))
        back.start()
        assert read(loaders, [4]) == expected
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: {shard}: this shard is gone") and line.endswith("; trying again in 0.2 s")


def test_a_shard_that_stays_away_ends_in_an_error_after_so_many_attempts(
    tmp_path, write_shard, records, tokenizer, monkeypatch, capfd
):
    monkeypatch.setattr("plrd_train.data.loader.WAITS_S", (0.01, 0.02, 0.04))
    shard = write_shard(tmp_path / "a.jsonl", records(range(30)))
    corpus = resolve_corpus(str(tmp_path), "train")
    shard.unlink()
    with ranks(corpus, tokenizer, 1, streams=1) as (loader,):
        with pytest.raises(UserError, match=f"{shard}: this shard is gone"):
            loader.next(1)
        assert capfd.readouterr().err.count("trying again") == 3


def test_a_loader_that_waits_for_a_shard_can_be_closed(tmp_path, write_shard, records, tokenizer, monkeypatch, capfd):
    monkeypatch.setattr("plrd_train.data.loader.WAITS_S", (1000.0,))
    shard = write_shard(tmp_path / "a.jsonl", records(range(30)))
    corpus = resolve_corpus(str(tmp_path), "train")
    shard.unlink()
    said = ""
    with ranks(corpus, tokenizer, 1, streams=1) as (loader,), ThreadPoolExecutor(1) as pool:
        failed = pool.submit(loader.next, 1)
        while "trying again in 1000 s" not in said:
            said += capfd.readouterr().err
        loader.close()
        assert isinstance(failed.exception(timeout=10), UserError)


@pytest.mark.parametrize("world_size", [1, 2])
def test_skipped_documents_are_counted_once_over_streams_ranks_and_epochs(
    tmp_path, write_shard, records, tokenizer, world_size
):
    good = records(range(60))
    corpus = resolve_corpus(
        str(write_shard(tmp_path / "a.jsonl", [*good[:9], b"no json", *good[9:], b"{}", b'{"text": ""}', b"no"])),
        "train",
    )
    with ranks(corpus, tokenizer, world_size, skip_bad=True) as loaders:
        read(loaders, [300])
        assert all(loader.epoch > 0 for loader in loaders)
        found = sum((Counter(loader.bad_documents) for loader in loaders), Counter())
    assert found == {"not JSON": 2, "no string under `text`": 1, "empty text": 1}


opened: list[str] = []
watching = False


def watch(event, arguments):
    if watching and event == "open" and isinstance(arguments[0], str) and arguments[0].endswith(".jsonl"):
        opened.append(arguments[0])


def test_a_seek_deep_into_ten_thousand_shards_opens_one_shard_a_stream(tmp_path, write_shard, records, tokenizer):
    global watching
    lines = records(range(20_000))
    for shard in range(10_000):
        write_shard(tmp_path / f"chunk{shard % 7}" / f"example_{shard:04}.jsonl", lines[2 * shard : 2 * shard + 2])
    corpus = resolve_corpus(str(tmp_path), "train")
    assert len(corpus.shards) == 10_000
    sys.addaudithook(watch)
    with ranks(corpus, tokenizer, 1, seq_len=512) as loaders:
        watching = True
        read(loaders, [300])
        saved = position_of(loaders)
        expected = read(loaders, [STREAMS])
        assert len(set(opened)) > 1000
        opened.clear()
        watching = False
    deep = {**saved, "cursors": {stream: [3, 1600 + int(stream), 0, 0] for stream in saved["cursors"]}}
    for position, sound in ((saved, [sequence[:8] for sequence in expected]), (deep, None)):
        with ranks(corpus, tokenizer, 2, position, seq_len=8) as loaders:
            watching = True
            assert opened == []  # a seek by itself reads nothing
            start = time.monotonic()
            sequences = read(loaders, [STREAMS])
            assert time.monotonic() - start < 10  # five times what a restart may take; a replay of so much takes longer
            watching = False
        assert sound is None or sequences == sound
        # The cursor's shard; one more where it stood at its end.
        assert len(set(opened)) <= 2 * STREAMS and len(opened) == len(set(opened))
        opened.clear()


def test_the_thread_ends_with_close(many_shards, tokenizer):
    before = set(threading.enumerate())
    with ranks(many_shards, tokenizer, 2) as loaders:
        read(loaders, [8])
        assert len(set(threading.enumerate()) - before) == 2
    assert set(threading.enumerate()) == before


def test_the_tokenizer_can_be_used_while_reading_ahead(many_shards, tokenizer, stories):
    text = "".join(stories(n) for n in range(40))
    with ranks(many_shards, tokenizer, 1) as (loader,):
        alone = read([loader], [400])
    with ranks(many_shards, tokenizer, 1) as (loader,):
        together = []
        for _ in range(40):
            together += read([loader], [10])
            tokenizer([text, "the cat"], truncation=True, max_length=16, padding=False)
    assert together == alone


def test_a_real_parent_on_real_text(assets):
    corpus = resolve_corpus(str(assets / "data" / "slimpajama-sample"), "train")
    tokenizer = AutoTokenizer.from_pretrained(assets / "parents" / "stories3m")
    settings = {"seq_len": 256, "streams": 12}  # eight shards: two stripes each
    with ranks(corpus, tokenizer, 1, **settings) as (loader,):
        expected = read([loader], [24, 40], streams=12)
        batch = loader.next(60)
    assert len(batch.domain_tokens) > 2 and all(domain.startswith("RedPajama") for domain in batch.domain_tokens)
    assert sum(batch.domain_tokens.values()) == 60 * 256
    with ranks(corpus, tokenizer, 3, **settings) as loaders:
        assert read(loaders, [64], streams=12) == expected

"""A corpus smaller than the budget: the run goes on into further epochs, says so, and counts them."""

import json

import pytest
from plain import texts
from processes import run_job
from tiny_family import write_corpus

STREAM_SEQUENCES = 4  # of the 8 a step, from each of two streams


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_corpus_smaller_than_the_budget_is_repeated(command, tmp_path, ranks):
    write_corpus(tmp_path / "text", shards=2, documents=10)
    run_dir = tmp_path / "run"
    # Two shards and two streams, so that each shard is a stream.
    ended = run_job(
        ranks,
        command(
            run_dir,
            f"data.train={tmp_path / 'text'}",
            "data.streams=2",
            "stages.ratios=[1.25]",
            "evaluation.tokens=200",
        ),
    )
    assert (ended.status, ended.err) == (0, "")
    text = [len(document.split()) for document in texts(tmp_path / "text" / "train")]
    lengths = [sum(text[:10]), sum(text[10:])]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    epochs = [row["data/epoch"] for row in rows]
    assert epochs == [max(((i + 1) * STREAM_SEQUENCES * 16 - 1) // length for length in lengths) for i in range(20)]
    for epoch in range(2, epochs[-1] + 2):
        assert f"data.train holds fewer tokens than the budget: epoch {epoch} of it begins" in ended.out

"""One family by both engines, through the whole pipeline: the same losses and perplexities, and nothing of DeepSpeed's
on the console."""

import functools
import json
from collections.abc import Callable

import pytest
from processes import run_job
from tiny_family import write_corpus, write_parent


@pytest.fixture(scope="module")
def family_of(tmp_path_factory) -> Callable[[str, int], tuple[dict, list[dict]]]:
    """family_of(engine, ranks) -> (family.json, the rows of metrics.jsonl): two stages of 20 steps in float32 of a
    parent with tied embeddings and GQA."""
    folder = tmp_path_factory.mktemp("parity")
    write_parent(folder / "parent", "llama_tied_scaled_rope")
    write_corpus(folder / "corpus")

    @functools.cache
    def make(engine: str, ranks: int) -> tuple[dict, list[dict]]:
        run_dir = folder / f"{engine}{ranks}"
        arguments = [
            "experiment=tinystories",
            f"parent.path={folder / 'parent'}",
            f"data.train={folder / 'corpus'}",
            f"run_dir={run_dir}",
        ]
        arguments += [
            f"data.validation={folder / 'corpus'}",
            "data.seq_len=16",
            "data.streams=6",
            "stages.ratios=[1.25,1.6]",
            "stages.tokens=2560",
        ]
        arguments += [
            "recover.global_batch_tokens=128",
            "recover.micro_batch=4",
            "recover.lr=4e-3",
            "tracking.wandb.mode=disabled",
        ]
        ended = run_job(ranks, [*arguments, f"engine={engine}", "engine.dtype=fp32"])
        assert (ended.status, ended.err) == (0, ""), ended.err
        assert not any(word in ended.out for word in ("DeepSpeed", "WARNING", "INFO", "[Rank")), ended.out
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return json.loads((run_dir / "family.json").read_text()), rows

    return make


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_losses_and_perplexities_of_two_stages_of_20_steps_are_the_same(family_of, ranks):
    (family, rows), (family_other, rows_other) = family_of("fsdp", 2), family_of("zero3", ranks)
    assert len(rows) == len(rows_other) == 40
    for name, tolerance in (("train/loss", 1e-4), ("train/grad_norm", 1e-3)):
        assert [row[name] for row in rows_other] == pytest.approx([row[name] for row in rows], abs=tolerance)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.3  # something was learned, so something could differ
    for member, member_other in zip(family["members"], family_other["members"], strict=True):
        assert member_other["eval"]["ppl"] == pytest.approx(member["eval"]["ppl"], rel=1e-4)
        assert member_other["params"] == member["params"] and member_other["ranks"] == member["ranks"]

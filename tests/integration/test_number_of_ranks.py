"""One family on 1, 2 and 3 ranks: the same losses and the same perplexities."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import kill_before
from processes import run_job


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(command, tmp_path_factory) -> Callable[[int], tuple[dict, list[dict]]]:
    """made(ranks) -> (family.json, the rows of metrics.jsonl). With 8 sequences a step and 6 streams the shares of 2
    and 3 ranks are unequal."""

    @functools.cache
    def make(ranks: int) -> tuple[dict, list[dict]]:
        run_dir = tmp_path_factory.mktemp("ranks") / "run"
        ended = run_job(ranks, command(run_dir, "data.streams=5"))
        assert (ended.status, ended.err) == (0, ""), ended.err
        return json.loads((run_dir / "family.json").read_text()), rows_of(run_dir)

    return make


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("ranks", [slow(2), 3])
def test_losses_of_two_stages_of_20_steps_are_the_same(made, ranks):
    (_, one), (_, several) = made(1), made(ranks)
    assert len(one) == len(several) == 40
    for name, tolerance in (("train/loss", 1e-4), ("train/grad_norm", 1e-3)):
        assert [row[name] for row in several] == pytest.approx([row[name] for row in one], abs=tolerance)
    counted = [name for name in one[0] if name.startswith(("data/", "tokens/")) or name in ("train/lr", "step")]
    assert [{name: row.get(name) for name in counted} for row in several] == [
        {name: row.get(name) for name in counted} for row in one
    ]
    assert one[-1]["train/loss"] < one[0]["train/loss"] - 0.3  # something was learned, so something could differ


@pytest.mark.parametrize("ranks", [slow(2), 3])
def test_perplexities_are_the_same(made, ranks):
    one, several = made(1)[0], made(ranks)[0]
    assert several["parent"]["eval"]["nll_tokens"] == one["parent"]["eval"]["nll_tokens"]
    assert several["parent"]["eval"]["ppl"] == pytest.approx(one["parent"]["eval"]["ppl"], rel=1e-6)
    for before, after in zip(one["members"], several["members"], strict=True):
        assert after["eval"]["ppl"] == pytest.approx(before["eval"]["ppl"], rel=1e-4)
        assert {**after, "world_size": 1}.keys() == before.keys() and after["ranks"] == before["ranks"]
    assert several["members"][0]["eval_factored"]["ppl"] == pytest.approx(
        one["members"][0]["eval_factored"]["ppl"], rel=1e-5
    )


CHANGES = [
    ("zero3", 2, 3),
    slow("fsdp", 1, 3),
    slow("fsdp", 2, 1),
    slow("fsdp", 2, 3),
    slow("zero3", 2, 1),
    slow("zero3", 1, 3),
]


@pytest.mark.parametrize(("engine", "before", "after"), CHANGES)
def test_a_killed_run_goes_on_alike_on_another_number_of_ranks(command, made, tmp_path, engine, before, after):
    """From a checkpoint in mid-stage: the same batches in the same order, and losses of an undisturbed run on one
    rank."""
    arguments = command(
        tmp_path / "run", "data.streams=5", f"engine={engine}", "engine.dtype=fp32", "checkpoint.tokens=640"
    )
    assert run_job(before, arguments, kill_before, "plrd_train.tracking.tracker:Tracker.log", 12).status == -9
    newest = max(int(path.name.split("-")[1]) for path in (tmp_path / "run" / "checkpoints").glob("step-*[0-9]"))
    assert 5 <= newest <= 12
    # It would not survive one step more.
    ended = run_job(after, arguments, kill_before, "plrd_train.recover.loop:Trainer._step", 40 - newest)
    assert (ended.status, ended.err) == (0, "")
    found, expected = rows_of(tmp_path / "run"), made(1)[1]
    counted = [name for name in expected[0] if name.startswith(("data/", "tokens/")) or name in ("train/lr", "step")]
    assert [[row[name] for name in counted] for row in found] == [[row[name] for name in counted] for row in expected]
    assert [row["train/loss"] for row in found[newest:]] == pytest.approx(
        [row["train/loss"] for row in expected[newest:]], abs=1e-4
    )

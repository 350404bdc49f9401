"""Steps that are left out: judged as stated, without a trace in weights and optimizer, and alike after a restart."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from processes import Ended, run_job
from test_loop import settings

from plrd_train.recover.guard import LEAST, WINDOW, Guard, Judged
from plrd_train.runtime.world import SharedError

STEPS = 30  # of the one stage
BAD = {20: math.nan, 24: 1e3, 25: -math.inf}  # step -> what its loss is multiplied by


def guard(spike: float | None = 5.0, patience: int = 3, judged: Judged | None = None) -> tuple[Guard, list[str]]:
    said: list[str] = []
    return Guard(settings(4, spike=spike, patience=patience), said.append, judged or Judged()), said


def test_the_bound_is_robust_statistics_of_the_last_losses():
    judge, _ = guard()
    losses = np.random.default_rng(0).normal(3.0, 0.2, 2 * WINDOW)
    for step, loss in enumerate(losses):
        judge.add(step, loss, 1.0, False)
        known = losses[: step + 1][-WINDOW:]  # for the step after the next
        if len(known) < LEAST:
            assert judge.bound(step + 2) == math.inf
        else:
            expected = np.median(known) + 5.0 * np.median(np.abs(known - np.median(known))) / NormalDist().inv_cdf(0.75)
            assert judge.bound(step + 2) == pytest.approx(expected, rel=1e-4)


def test_losses_that_hardly_differ_leave_room():
    judge, _ = guard()
    for step in range(WINDOW):
        judge.add(step, 2.0 + 1e-6 * step, 1.0, False)
    assert judge.bound(WINDOW + 1) == pytest.approx(2.1, abs=1e-3)


def test_the_bound_is_the_same_whether_the_step_before_is_known_or_not():
    judge, _ = guard()
    for step in range(LEAST + 5):
        judge.add(step, 3.0 + 0.1 * (step % 3), 1.0, False)
    before = judge.bound(LEAST + 5)
    judge.add(LEAST + 5, 100.0, 1.0, False)  # step LEAST + 6 is next, and might be judged before or after this came in
    assert judge.bound(LEAST + 6) == guard(judged=Judged(recent=judge.judged.recent[:-1]))[0].bound(LEAST + 6)
    assert before < math.inf


def test_no_loss_is_too_high_where_that_is_asked_for():
    judge, _ = guard(spike=None)
    for step in range(WINDOW):
        judge.add(step, 3.0, 1.0, False)
    assert judge.bound(WINDOW + 1) == math.inf


def test_so_many_in_a_row_end_the_run_and_a_good_one_between_begins_anew():
    judge, said = guard(patience=3)
    for step, (loss, norm, skipped) in enumerate(
        [(math.nan, 1.0, True), (3.0, math.inf, True), (3.0, 1.0, False), (math.nan, 1.0, True)]
    ):
        judge.add(step, loss, norm, skipped)
    assert judge.judged == Judged(skipped=3, in_a_row=1, recent=[(2, 3.0)])
    assert said[:2] == [
        "warning: step 1 of this stage is left out: its loss is nan",
        "warning: step 2 of this stage is left out: its gradient's norm is inf",
    ]
    judge.add(4, math.nan, 1.0, True)
    with pytest.raises(
        SharedError, match=r"recover\.patience: 3 steps in a row are left out, the last because its loss is nan"
    ):
        judge.add(5, math.nan, 1.0, True)


# The main job


def spoil(rank: int, bad: Mapping[int, float], killed_at: int | None = None) -> None:
    """The losses of these steps of the run are multiplied; rank 0 is killed in place of step `killed_at`."""
    import os
    import signal

    from plrd_train.recover.loop import Trainer

    sound = Trainer._micro_batch

    def spoiled(trainer: Trainer, input_ids):
        if trainer.counters.steps == killed_at and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        factor = bad.get(trainer.counters.steps, 1.0)

        def terms(*given):
            return {name: term * factor for name, term in trainer.recipe.objective(*given).items()}

        recipe = dataclasses.replace(trainer.recipe, objective=terms)
        return sound(dataclasses.replace(trainer, recipe=recipe), input_ids)

    Trainer._micro_batch = spoiled  # type: ignore[method-assign]


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def job(command) -> Callable[..., Ended]:
    """job(run_dir, engine, bad steps, killed_at): a family of one stage on two ranks."""

    def run(run_dir: Path, engine: str, bad: Mapping[int, float], killed_at: int | None = None) -> Ended:
        stage = (
            "stages.ratios=[1.25]",
            f"stages.tokens={STEPS * 128}",
            f"engine={engine}",
            "engine.dtype=fp32",
            "recover.patience=4",
        )
        return run_job(2, command(run_dir, *stage, "checkpoint.tokens=640"), spoil, bad, killed_at)

    return run


@pytest.mark.parametrize(("engine", "killed_at"), [("fsdp", 24), pytest.param("zero3", 29, marks=pytest.mark.slow)])
def test_bad_steps_are_left_out_and_a_restart_judges_alike(job, tmp_path, engine, killed_at):
    ended = job(tmp_path / "run", engine, BAD)
    assert (ended.status, ended.err) == (0, "")
    made = rows(tmp_path / "run")
    assert [row["train/skipped"] for row in made] == [sum(bad <= step for bad in BAD) for step in range(STEPS)]
    assert [row["step"] for row in made if row["train/loss"] is None] == [20, 25]
    assert ended.out.count("is left out") == 3 and "step 25 of this stage is left out: its loss of" in ended.out
    assert job(tmp_path / "killed", engine, BAD, killed_at).status == -9
    assert job(tmp_path / "killed", engine, BAD).status == 0
    assert [row["train/loss"] for row in rows(tmp_path / "killed")] == [row["train/loss"] for row in made]
    weights = [tmp_path / name / "members" / "1.25x" / "model.plrd.safetensors" for name in ("run", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_nothing_but_bad_steps_end_the_run_and_keep_the_checkpoint_before(job, tmp_path):
    run_dir = tmp_path / "run"
    ended = job(run_dir, "fsdp", dict.fromkeys(range(12, STEPS), math.nan))
    assert ended.status == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: recover.patience: 4 steps in a row are left out") and "Traceback" not in ended.out
    ended = job(run_dir, "fsdp", {})  # the text was to blame, and has been mended
    assert (ended.status, ended.err) == (0, "")
    assert len(rows(run_dir)) == STEPS and rows(run_dir)[-1]["train/loss"] < rows(run_dir)[0]["train/loss"]

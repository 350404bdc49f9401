"""A step that does not come to its end ends the run, which names the rank that hangs and what the others wait in."""

import re
import time

import pytest
from processes import run_job

from plrd_train.recover import deadline
from plrd_train.recover.deadline import FIRST_S, LEAST_S, Deadline


class Heard:
    """A heartbeat that keeps what it is told."""

    def __init__(self):
        self.said = []

    def expect(self, seconds):
        self.said.append(seconds)


def test_two_steps_may_take_long_and_the_others_as_long_as_those_before_suggest(monkeypatch):
    heard, clock = Heard(), iter([0.0, 100.0, 102.0, 103.0, 500.0, 510.0])
    monkeypatch.setattr(deadline.time, "monotonic", lambda: next(clock))
    steps = Deadline(heard)
    for _ in range(4):
        steps.step()
    steps.rest()
    steps.step()
    steps.step()
    assert heard.said == [FIRST_S, 2000.0, 2000.0, 2000.0, None, 2000.0, 2000.0] and LEAST_S < 2000.0


def hang_in_step(rank: int, step: int) -> None:
    """Rank 1 never gets the text of this step; the bounds are seconds."""
    from plrd_train.data.loader import Loader

    deadline.FIRST_S, deadline.LEAST_S = 60.0, 2.0
    whole, calls = Loader.next, iter(range(1000))

    def hanging(loader, sequences):
        if rank == 1 and next(calls) == step:
            time.sleep(1000)
        return whole(loader, sequences)

    Loader.next = hanging


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_step_that_hangs_ends_the_run_and_names_the_rank_and_the_collective(command, tmp_path, engine):
    ended = run_job(2, command(tmp_path / "run", f"engine={engine}", "checkpoint.tokens=640"), hang_in_step, 8)
    assert ended.status == 1
    (line,) = ended.err.splitlines()
    assert line.startswith("error: no progress for ") and line.endswith(
        "the same command goes on from the last checkpoint"
    )
    guilty, waiting, _ = line.split("; ")
    assert "rank 1 (" in guilty and " is in " in guilty
    assert re.search(r"rank 0 \(.*\) waits in (all_gather|reduce_scatter)\w* \(plrd_train/", waiting)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*[0-9]"))

"""The learning rate of each step."""

import dataclasses
import functools
import itertools
import math

import pytest

from plrd_train.config.compose import compose
from plrd_train.config.schema import from_mapping
from plrd_train.recover.schedule import anneal, peak_rate, rate
from plrd_train.recover.settings import Recover


@functools.cache
def composed() -> Recover:
    (job,) = compose(["experiment=quickstart"])
    return from_mapping(job).recover


def settings(**values) -> Recover:
    return dataclasses.replace(composed(), **values)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_rises_by_equal_steps_to_the_peak(schedule):
    it = settings(schedule=schedule, warmup=0.2)
    assert [rate(step, 20, 3.0, it) for step in range(4)] == pytest.approx([0.75, 1.5, 2.25, 3.0])
    assert [rate(step, 1, 3.0, it) for step in range(1)] == [3.0]


@pytest.mark.parametrize(("schedule", "halfway"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_then_it_falls_to_the_final_rate_of_the_last_step(schedule, halfway):
    it = settings(schedule=schedule, warmup=0.1, final=0.1)
    rates = [rate(step, 110, 2.0, it) for step in range(110)]
    assert max(rates) == 2.0 == rates[10]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[11 + 48] == pytest.approx(2 * halfway, rel=0.02)
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)


def test_cosine_is_half_a_cosine():
    it = settings(schedule="cosine", warmup=0.0, final=0.0)
    for done in (1, 25, 50, 75, 100):
        assert rate(done - 1, 100, 1.0, it) == pytest.approx((1 + math.cos(math.pi * done / 100)) / 2)


def test_without_warmup_a_stage_of_one_step_has_a_rate():
    assert rate(0, 1, 1.0, settings(warmup=0.0, schedule="constant")) == 1.0
    assert rate(0, 1, 1.0, settings(warmup=0.0, schedule="linear", final=0.5)) == 0.5


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_branch_falls_by_a_line_that_would_reach_zero_behind_its_last_step(steps):
    rates = [2.0, *(anneal(step, steps, 2.0) for step in range(steps)), 0.0]
    assert [before - after for before, after in itertools.pairwise(rates)] == pytest.approx(
        [2.0 / (steps + 1)] * (steps + 1)
    )


def test_the_peak_is_the_key_or_follows_the_width():
    assert peak_rate(settings(lr=3e-3), 4096) == 3e-3
    assert peak_rate(settings(lr=None), 128) == 2 * peak_rate(settings(lr=None), 256) > 0

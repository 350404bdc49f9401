"""The learning rate of each step."""

import itertools
import math

import pytest

from plrd_train.config.compose import compose
from plrd_train.config.schema import Config, from_mapping
from plrd_train.recover.schedules import SCHEDULES


def schedule(name: str, **settings):
    """That schedule; without a branch or a warmup, and falling to zero, unless told otherwise."""
    kind = SCHEDULES.settings_of(name)
    values = {"warmup": 0.0, "branch": 0.0, **({} if name == "constant" else {"final": 0.0}), **settings}
    return kind(**values)


def configured(*overrides: str) -> Config:
    (job,) = compose(["experiment=quickstart", *overrides])
    return from_mapping(job)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warmup_rises_by_equal_steps_to_the_peak(name):
    it = schedule(name, warmup=0.2)
    assert it.rates(20, 3.0).trunk[:4] == pytest.approx((0.75, 1.5, 2.25, 3.0))
    assert it.rates(1, 3.0).trunk == (3.0,)


@pytest.mark.parametrize(("name", "halfway"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_then_it_falls_to_the_final_rate_of_the_last_step(name, halfway):
    it = schedule(name, warmup=0.1, **({} if name == "constant" else {"final": 0.1}))
    rates = it.rates(110, 2.0).trunk
    assert len(rates) == 110 and max(rates) == 2.0 == rates[10]
    assert list(rates[10:]) == sorted(rates[10:], reverse=True)
    assert rates[11 + 48] == pytest.approx(2 * halfway, rel=0.02)
    assert rates[-1] == pytest.approx(2.0 if name == "constant" else 0.2)


def test_cosine_is_half_a_cosine():
    rates = schedule("cosine").rates(100, 1.0).trunk
    for done in (1, 25, 50, 75, 100):
        assert rates[done - 1] == pytest.approx((1 + math.cos(math.pi * done / 100)) / 2)


def test_without_warmup_a_stage_of_one_step_has_a_rate():
    assert schedule("constant").rates(1, 1.0).trunk == (1.0,)
    assert schedule("linear", final=0.5).rates(1, 1.0).trunk == (0.5,)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_branch_falls_by_a_line_that_would_reach_zero_behind_its_last_step(steps):
    rates = schedule("constant", branch=0.5).rates(2 * steps, 2.0)
    assert rates.trunk == (2.0,) * steps
    assert [before - after for before, after in itertools.pairwise((2.0, *rates.branch, 0.0))] == pytest.approx(
        [2.0 / (steps + 1)] * (steps + 1)
    )


def test_the_trunk_of_a_branched_stage_ends_its_own_schedule():
    rates = schedule("linear", branch=0.25, final=0.5).rates(8, 1.0)
    assert (len(rates.trunk), len(rates.branch)) == (6, 2)
    assert rates.trunk[-1] == 0.5 and rates.branch == pytest.approx((1 / 3, 1 / 6))


def test_a_run_knows_whether_its_stages_branch():
    assert not configured().branches()
    assert configured("schedule.branch=0.3").branches()
    assert not configured("schedule.branch=0.3", "stages.tokens=1024").branches()  # a single step has no room for one


def test_the_peak_is_the_key_or_follows_the_width():
    given, rule = configured("recover.lr=3e-3").recover, configured("recover.lr=null").recover
    assert given.peak_rate(4096) == 3e-3
    assert rule.peak_rate(128) == 2 * rule.peak_rate(256) > 0

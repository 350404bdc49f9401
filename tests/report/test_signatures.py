"""The signs of a bad compression are seen where they are, and only there."""

import math

import pytest
import records

from plrd_train.family import Member, ParentRecord, Scores
from plrd_train.report.signatures import FAR, JUMP, SLOWER, signs

STEPS, TOKENS = 200, 100  # of a stage; of a step
PARENT = ParentRecord(path="p", params=2_000_000, eval=Scores(ppl=math.exp(2.0)))


def member(stage: int, factored: float, after: float) -> Member:
    """With held-out losses, in nats, above the parent."""
    scores = {"eval_factored": {"ppl": math.exp(2.0 + factored)}, "eval": {"ppl": math.exp(2.0 + after)}}
    return Member(**records.member(f"{stage}x", **scores))


def rows(*times: float, noise: float = 0.05) -> list[dict]:
    """Stages whose loss falls by exp(-step / time), with noise of a known kind."""
    made = []
    for stage, time in enumerate(times, 1):
        for step in range(STEPS):
            loss = 2.0 + math.exp(-step / time) + noise * math.sin(2.4 * step)
            made.append({"stage/index": stage, "tokens/total": TOKENS * (len(made) + 1), "train/loss": loss})
    return made


def found(*arguments) -> list[int]:
    return [sign.stage for sign in signs(*arguments)]


def test_a_sound_family_has_none():
    members = [member(1, 0.8, 0.02), member(2, 0.5, 0.04), member(3, 0.5, 0.2)]
    assert signs(PARENT, members, rows(60.0, 55.0, 60.0)) == []


def test_a_jump_is_measured_from_the_model_before():
    members = [member(1, JUMP + 0.1, 0.05), member(2, 0.05 + JUMP - 0.1, 0.05), member(3, 0.05 + JUMP + 0.1, 0.1)]
    first, third = signs(PARENT, members, [])
    assert (first.stage, third.stage) == (1, 3)
    assert first.words.startswith("stage 1 (1x): factoring raised the held-out loss from 2.00 to 3.10; ")
    assert "from 2.05 to 3.15" in third.words


@pytest.mark.parametrize(
    ("time", "after", "flat"), [(5.0, FAR + 0.1, True), (5.0, FAR - 0.05, False), (60.0, FAR + 0.1, False)]
)
def test_a_plateau_is_flat_early_and_far_from_the_parent(time, after, flat):
    made = signs(PARENT, [member(1, 0.5, after)], rows(time))
    assert bool(made) == flat
    assert not flat or ("lies flat at 1.99" in made[0].words and "0.20 above" in made[0].words)


def test_a_convergence_that_slows_over_three_stages():
    members = [member(stage, 0.3, 0.01) for stage in (1, 2, 3, 4)]
    assert found(PARENT, members, rows(15.0, 30.0, 15.0 * SLOWER * 1.6, 200.0)) == [3, 4]
    assert found(PARENT, members, rows(60.0, 62.0, 64.0, 66.0)) == []  # hardly
    assert found(PARENT, members, rows(15.0, 60.0, 40.0, 80.0)) == []  # not each
    assert found(PARENT, members[:2], rows(15.0, 60.0)) == []


def test_what_was_not_measured_is_no_sign():
    short = [row for row in rows(5.0) if row["tokens/total"] <= 60 * TOKENS]
    lost = [{**row, "train/loss": None} for row in rows(5.0)]
    for known in ([], short, lost):
        assert signs(PARENT, [Member(**records.member("1x", eval={"ppl": 20.0}))], known) == []
    assert signs(ParentRecord(path="p", params=1), [member(1, 5.0, 5.0)], rows(5.0)) == []

"""launch/slurm/point.py: each task of an array takes one point of a sweep."""

import importlib.util
from pathlib import Path

import pytest

from plrd_train.compose import compose
from plrd_train.errors import UserError

SWEEP = [
    "experiment=quickstart",
    "stages.ratios=[1.5,2]",
    "recipe=paper,default",
    "tracking.wandb.name='a b, c','ä#d'",
    "parent.revision=ä#d",
    "run_dir=runs/${recipe}/x y-${tracking.wandb.name}",
]


@pytest.fixture(scope="module")
def point():
    spec = importlib.util.spec_from_file_location("point", Path(__file__).resolve().parents[1] / "launch" / "slurm" / "point.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.point


def test_a_point_is_what_multirun_makes_of_it(point):
    expected = compose(["--multirun", *SWEEP])
    assert len(expected) == 4
    assert compose(point(2, SWEEP)) == [expected[2]]


@pytest.mark.parametrize(
    ("index", "arguments", "message"),
    [
        (2, ["experiment=quickstart", "run_dir=a,b"], "--array: there is no point 2; the overrides describe 2: submit with --array=0-1"),
        (0, ["experiment=quickstart", "seed=1,2"], "run_dir: two points write runs/quickstart"),
        (0, ["experiment=quickstart", "seed=1,x", "run_dir='runs/${seed}'"], "seed: "),
    ],
)
def test_mistakes_are_found_by_every_task(point, index, arguments, message):
    with pytest.raises(UserError) as error:
        point(index, arguments)
    assert message in str(error.value)

"""launch/slurm/: point.py, by which a task of an array takes one point of a sweep, and run_dir.py, by which a job
logs."""

import importlib.util
from pathlib import Path

import pytest

from plrd_train.config.compose import compose
from plrd_train.errors import UserError

SWEEP = [
    "experiment=quickstart",
    "stages.ratios=[1.5,2]",
    "recipe=paper,default",
    "tracking.wandb.name='a b, c','ä#d'",
    "parent.revision=ä#d",
    "run_dir=runs/${recipe}/x y-${tracking.wandb.name}",
    "data.train=~/a",
    "data.validation='~/b'",
]


def imported(name):
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).resolve().parents[2] / "launch" / "slurm" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def point():
    return imported("point").point


def test_a_point_is_what_multirun_makes_of_it(point):
    expected = compose(["--multirun", *SWEEP])
    assert len(expected) == 4
    assert compose(point(2, SWEEP)) == [expected[2]]


@pytest.mark.parametrize(
    ("index", "arguments", "message"),
    [
        (
            2,
            ["experiment=quickstart", "run_dir=a,b"],
            "--array: there is no point 2; the overrides describe 2: submit with --array=0-1",
        ),
        (0, ["experiment=quickstart", "seed=1,2"], "run_dir: two points write runs/quickstart"),
        (0, ["experiment=quickstart", "seed=1,x", "run_dir='runs/${seed}'"], "seed: "),
    ],
)
def test_mistakes_are_found_by_every_task(point, index, arguments, message):
    with pytest.raises(UserError) as error:
        point(index, arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "printed", "said"),
    [
        (["run_dir='~/x y'"], "/home/me/x y\n", ""),
        (["parent.path=~/p", "run_dir=runs/${parent.path}"], "runs//home/me/p\n", ""),
        ([], "runs/quickstart\n", ""),
        (["run_dir='~nobody_such/x'"], "", "error: run_dir: ~nobody_such/x: "),
        (["seed=x"], "", "error: seed: "),
        (["--multirun", "seed=1,2", "run_dir=r-${seed}"], "", "error: these arguments describe 2 runs"),
    ],
)
def test_where_a_job_logs_is_where_its_run_writes(monkeypatch, capfd, arguments, printed, said):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("sys.argv", ["run_dir.py", "experiment=quickstart", *arguments])
    if said:
        with pytest.raises(SystemExit, match="2"):
            imported("run_dir").main()
    else:
        imported("run_dir").main()
    out, err = capfd.readouterr()
    assert out == printed and err.startswith(said) and err.count("\n") == bool(said)

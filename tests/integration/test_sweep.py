"""`--multirun`: points one after the other in the ranks that are there, or each a job of its own with a torchrun of its
own."""

import sys
from pathlib import Path

import pytest
from launching import launched
from omegaconf import OmegaConf
from processes import run_job
from test_restart import SHORT, same_members

from plrd_train.config.sweep import PointError, is_for_jobs, points, run_point, submit
from plrd_train.errors import UserError

ONE_STAGE = (SHORT, "stages.ratios=[1.25]")


def test_points_in_the_present_ranks(command, tmp_path):
    arguments = [*command(tmp_path / "seed-${seed}", *ONE_STAGE), "--multirun", "seed=0,1"]
    ended = run_job(2, arguments)
    assert (ended.status, ended.err) == (0, "")
    assert run_job(2, command(tmp_path / "alone", *ONE_STAGE, "seed=1")).status == 0
    assert same_members(tmp_path / "seed-1", tmp_path / "alone") and not same_members(
        tmp_path / "seed-0", tmp_path / "alone"
    )


def test_points_as_jobs(command, tiny, tmp_path, monkeypatch):
    """One of them finds its corpus gone: the other is made nevertheless, and the sweep says which failed, and where to
    read why."""
    monkeypatch.chdir(tmp_path)
    sweep = [
        "--multirun",
        "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=30",
        f"data.train=/no/where,{tiny / 'corpus'}",
    ]
    arguments = command(tmp_path / "Größter Lauf ${hydra:job.num}", *ONE_STAGE, *sweep)
    with launched([sys.executable, "-m", "plrd_train", *arguments], NPROC=1, OMP_NUM_THREADS=1) as run:
        assert run.status() == 2
        line = run.err.splitlines()[-1]
        assert line.startswith("error: the point ") and "data.train=/no/where" in line and "ended with status 2" in line
        log = Path(line.rpartition("see ")[2])
    (said,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "/no/where" in said and log.is_relative_to(tmp_path / "runs" / "multirun")
    assert run_job(1, command(tmp_path / "alone", *ONE_STAGE)).status == 0
    assert same_members(tmp_path / "Größter Lauf 1", tmp_path / "alone")


TWO = (
    "experiment=tinystories",
    "parent.path=p",
    "data.train=t",
    "data.validation=v",
    "--multirun",
    "recover.lr=1e-3,2e-3",
)


def test_points_are_told_apart_by_their_run_dirs():
    assert [point["run_dir"] for point in points([*TWO, "run_dir=runs/${recover.lr}"])] == ["runs/0.001", "runs/0.002"]
    assert [point["run_dir"] for point in points([*TWO, "run_dir=runs/${hydra:job.num}"])] == ["runs/0", "runs/1"]


@pytest.mark.parametrize("run_dir", [[], ["run_dir=a/../b,./b"]])
def test_points_that_would_write_one_run_dir_are_refused(run_dir):
    with pytest.raises(UserError, match=r"^run_dir: two points write [^\n]*$"):
        points([*TWO, *run_dir])


def test_a_point_that_is_wrong_is_found_before_the_first_begins():
    with pytest.raises(UserError, match=r"recover\.lr"):
        points([*TWO, "recover.lr=1e-3,-1", "run_dir=runs/${recover.lr}"])


def test_hydra_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    points([*TWO, "run_dir=at-${recover.lr}"])
    assert not list(tmp_path.iterdir())


def test_which_launchers_submit_jobs():
    assert [
        is_for_jobs([argument])
        for argument in ("hydra/launcher=submitit_slurm", "+hydra/launcher=mine", "hydra.launcher.nodes=2")
    ] == [True] * 3
    assert [
        is_for_jobs([argument]) for argument in ("hydra/launcher=basic", "seed=0", "hydra.verbose=true", "--multirun")
    ] == [False] * 4


@pytest.mark.parametrize(
    ("environment", "launcher", "message"),
    [
        ({"RANK": "0"}, "submitit_slurm", "start this sweep without torchrun"),
        ({}, "sumbitit_slurm", "sumbitit_slurm"),
        ({}, "submitit_slurm", "srun"),
    ],
)
def test_a_sweep_that_cannot_be_submitted(tmp_path, monkeypatch, capfd, environment, launcher, message):
    monkeypatch.chdir(tmp_path)
    for name, value in ({"PATH": "/nowhere"} | environment).items():
        monkeypatch.setenv(name, value)
    assert submit([*TWO, "run_dir=at-${recover.lr}", f"hydra/launcher={launcher}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_job_of_several_tasks_a_node_is_refused(monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_NTASKS", "8")
    with pytest.raises(PointError, match="tasks_per_node"):
        run_point(OmegaConf.create())

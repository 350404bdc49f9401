"""Malformed run folders, each given to the command of its run."""

import shutil

import bad_runs
import pytest
from malformed import contents
from processes import run_job

RATIOS = "stages.ratios=[1.25,1.6,2]"  # one more than it has, so that it has to go on from a checkpoint


@pytest.fixture(scope="module")
def run(sound, tmp_path_factory):
    """(its folder, where a sound copy lies, the arguments of its command)."""
    home = tmp_path_factory.mktemp("runs")
    arguments = [
        "experiment=tinystories",
        f"parent.path={sound / 'parent'}",
        f"data.train={sound / 'corpus'}",
        f"data.validation={sound / 'corpus'}",
        f"run_dir={home / 'run'}",
        "data.seq_len=16",
        "data.streams=6",
        "stages.ratios=[1.25,1.6]",
        "stages.tokens=384",
        "evaluation.tokens=500",
        "recover.global_batch_tokens=128",
        "recover.micro_batch=4",
        "tracking.wandb.mode=disabled",
    ]
    ended = run_job(1, arguments)
    assert (ended.status, ended.err) == (0, "")
    (home / "run").rename(home / "sound")
    return home / "run", home / "sound", [*arguments, RATIOS]


@pytest.mark.parametrize("name", bad_runs.RUNS)
def test_a_malformed_run_is_refused(name, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder, sound, arguments = run
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    case = bad_runs.RUNS[name]
    case.spoil(folder)
    before = contents(folder)
    ended = run_job(1, arguments)
    assert (ended.status, ended.err.count("\n"), ended.err[:7]) == (2, 1, "error: "), (
        ended.status,
        ended.out[-300:],
        ended.err[-1500:],
    )
    for part in case.named:
        assert part in ended.err, (part, ended.err)
    after = contents(folder)
    for files in (before, after):
        files.pop("config.yaml", None)  # names the ratios that were added
    assert after == before
    assert not (tmp_path / "ran").exists()

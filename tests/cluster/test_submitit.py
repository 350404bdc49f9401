"""A sweep whose points are jobs of a real Slurm (tests/cluster/slurm_lab.py), of two nodes each."""

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from launching import launched
from processes import run_job
from safetensors.torch import load_file
from slurm_lab import cluster

JOBS = [
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.nodes=2",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.timeout_min=20",
]


def in_training(run_dir: Path) -> bool:
    file = run_dir / "metrics.jsonl"
    return file.exists() and len(file.read_text().splitlines()) > 2


def test_a_point_that_is_preempted_is_requeued_and_goes_on(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ("stages.tokens=2560", "stages.ratios=[1.25]")
    sweep = command(tmp_path / "seed-${seed}", *short, "--multirun", "seed=0,1", *JOBS)
    with TemporaryDirectory() as folder, cluster(Path(folder)) as slurm:  # munge wants a folder that all can enter
        here = [*slurm.reach(), sys.executable, "-m", "plrd_train", *sweep]
        with launched(here, **{**slurm.environment, "NPROC": 1, "GLOO_SOCKET_IFNAME": None}) as run:
            run.wait_until(lambda: in_training(tmp_path / "seed-0"))
            (array,) = {number.partition("_")[0] for number in slurm.run("squeue", "--noheader", "--format=%i").split()}
            slurm.run("scancel", "--signal=USR2", f"{array}_0")
            end = time.monotonic() + 120
            while slurm.job(f"{array}_0")["Restarts"] != "1":
                assert time.monotonic() < end
                time.sleep(0.2)
            assert run.status() == 0, run.err
    (log,) = (tmp_path / "runs" / "multirun").glob(f"*/.submitit/{array}_0/{array}_0_0_log.out")
    assert (
        log.read_text().count("stopped as asked, after ") == 1
        and log.read_text().count("perplexity of the parent") == 1
    )
    for seed in (0, 1):
        assert run_job(2, command(tmp_path / f"alone-{seed}", *short, f"seed={seed}")).status == 0
        (made,), (alone,) = (
            folder.glob("members/1.25x/*.safetensors")
            for folder in (tmp_path / f"seed-{seed}", tmp_path / f"alone-{seed}")
        )
        made, alone = load_file(made), load_file(alone)
        assert made.keys() == alone.keys() and all((made[name] == tensor).all() for name, tensor in alone.items())

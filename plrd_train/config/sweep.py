"""The points of a sweep (`--multirun`).

Hydra's own launcher runs them one after the other in the present ranks. With `hydra/launcher=submitit_slurm` (or
`submitit_local`, to try that out) each point is a job of its own, and each job a torchrun of its own: all points are
checked, and then submitted at once.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from plrd_train.config.compose import call_hydra, compose, expand_paths
from plrd_train.config.overrides import literal
from plrd_train.config.schema import from_mapping
from plrd_train.errors import UserError
from plrd_train.runtime.heartbeat import say

_LAUNCHER = re.compile(r"[+~]*hydra[./]launcher\b")
_IN_PROCESS = "hydra/launcher=basic"


class PointError(Exception):
    """The torchrun of a point ended with `status`, which is not 0."""

    def __init__(self, status: int, message: str):
        super().__init__(status, message)
        self.status, self.message = status, message


def points(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The config of each job that `arguments` describe, all of them checked. Raises UserError as `compose` and
    `from_mapping` do, and where two would write the same run_dir."""
    jobs = compose(arguments)
    run_dirs: set[Path] = set()
    for job in jobs:
        from_mapping(job)
        run_dir = Path(job["run_dir"]).resolve()
        if run_dir in run_dirs:
            raise UserError(
                f"run_dir: two points write {job['run_dir']}; let it name what differs, as "
                f"run_dir='runs/lr-${{recover.lr}}' does"
            )
        run_dirs.add(run_dir)
    return jobs


def is_for_jobs(arguments: Sequence[str]) -> bool:
    """Whether `arguments` choose a launcher that submits jobs."""
    return any(_LAUNCHER.match(argument) and argument != _IN_PROCESS for argument in arguments)


def submit(arguments: Sequence[str]) -> int:
    """Submit a job for each point and wait for all of them. Returns an exit status: 0, or that of the first point that
    failed, or 2 after a user's mistake; what went wrong is said in a line."""
    try:
        _submit(arguments)
    except (UserError, PointError) as error:
        say(error.message if isinstance(error, PointError) else str(error))
        return error.status if isinstance(error, PointError) else 2
    except KeyboardInterrupt:
        say("jobs that are submitted stay so; end them by their scheduler's command")
        return 128 + signal.SIGINT
    return 0


def _submit(arguments: Sequence[str]) -> None:
    if "RANK" in os.environ:
        raise UserError(
            "hydra/launcher: start this sweep without torchrun, or unset RANK; each job starts a torchrun itself"
        )
    if find_spec("submitit") is None:
        raise UserError("hydra/launcher: submitit is not installed here; pip install 'plrd-train[slurm]'")
    from submitit.core.utils import FailedJobError, UncompletedJobError

    jobs = points([argument for argument in arguments if not _LAUNCHER.match(argument)])
    print(f"{len(jobs)} jobs, a torchrun each: {', '.join(job['run_dir'] for job in jobs)}", flush=True)
    try:
        call_hydra(arguments, run_point)
    except (FailedJobError, UncompletedJobError) as error:
        # What happened, more of it, and the end of the log or its path.
        lines = [line.strip(" -") for line in str(error).splitlines()]
        raise PointError(1, " ".join(dict.fromkeys(line for line in (*lines[:2], lines[-1]) if line))) from None
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        raise UserError(
            "hydra/launcher: there is no srun here; start the sweep where jobs of the Slurm cluster are submitted"
        ) from None


def run_point(config: DictConfig) -> None:
    """Inside a job, once on each of its nodes: run the point's torchrun to its end. Raises PointError where it ends
    with another status than 0.

    The signal that Slurm sends some time before the limit (`hydra.launcher.signal_delay_s`) asks the run to stop, and
    submitit then requeues the job, as often as `hydra.launcher.max_num_timeout` says.
    """
    import submitit
    import torch
    from submitit.core.utils import UncompletedJobError

    expand_paths(config)
    job = submitit.JobEnvironment()
    if job.num_tasks != job.num_nodes:
        raise PointError(2, "hydra.launcher.tasks_per_node: leave it at 1; the job's torchrun starts the ranks")
    place = ["--standalone"]
    if job.num_nodes > 1:
        port = 20_000 + int(job.raw_job_id) % 10_000
        place = [
            "--nnodes",
            str(job.num_nodes),
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            f"{job.hostnames[0]}:{port}",
        ]
    ranks = int(os.environ.get("NPROC", torch.cuda.device_count() or 2))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = max(1, cores // ranks)
    known = HydraConfig.get()
    folders = [
        f"--config-dir={source.path}" for source in known.runtime.config_sources if source.provider == "command-line"
    ]
    told = [override.removeprefix("++") for override in known.overrides.task]  # compose adds the ++
    # run_dir is given resolved: it may hold ${hydra:job.num}, which only this sweep knows.
    overrides = [*folders, *told, f"run_dir={literal(config.run_dir)}"]

    number = signal.Signals[f"SIG{job.USR_SIG}"]
    # Slurm signals all processes of the job; the children inherit that they ignore it.
    requeue = signal.signal(number, signal.SIG_IGN)
    torchrun = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "plrd_train.runtime.torchrun",
            *place,
            "--nproc_per_node",
            str(ranks),
            "-m",
            "plrd_train",
            *overrides,
        ],
        env={"OMP_NUM_THREADS": str(threads), **os.environ},
    )
    asked = []

    def stop(*signalled: Any) -> None:
        asked.append(signalled)
        torchrun.terminate()

    signal.signal(number, stop)
    status, why = torchrun.wait(), ""
    if asked and status and callable(requeue):
        try:
            requeue(*asked[0])  # which ends this process, on the first node
        except UncompletedJobError as error:
            why = f" ({error})"
    if status:
        raise PointError(
            status, f"the point {' '.join(overrides)} ended with status {status}{why}; see {job.paths.stderr}"
        )

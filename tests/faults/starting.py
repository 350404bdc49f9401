"""One start of the main job that meets a fault, on real processes: under a launcher or without one, always within a
bound."""

import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from launching import launched
from processes import main_job, started

from faults.striking import Notes, arm

if TYPE_CHECKING:
    from faults.kinds import Fault

ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 150  # for a start, thirty times what one takes
TOGETHER_S = 30  # from the end of the first rank to that of the last


@dataclass(frozen=True)
class Start:
    """How it ended: the exit statuses of the ranks, or of their launcher alone; what they wrote; whether the fault
    `struck`, and which shard it broke; and the optimizer steps, counted over the run, that rank 0 began."""

    statuses: list[int]
    pids: list[int]
    out: str
    err: str
    hung: bool
    struck: bool
    shard: str
    steps: list[int]
    seconds: float

    @property
    def done(self) -> bool:
        return not self.hung and not any(self.statuses)


def start(
    world_size: int,
    arguments: Sequence[str],
    fault: "Fault | None",
    run_dir: Path,
    corpus: Path,
    by_launcher: bool = False,
) -> Start:
    """The main job until it ends, or `hung` with the stacks of its ranks in `err`; nothing of it runs on."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        notes = Notes(Path(folder))
        plan = (None if fault is None else dataclasses.astuple(fault), str(run_dir), str(corpus), folder)
        run = _launched if by_launcher else _started
        statuses, pids, out, err, hung = run(world_size, arguments, plan, notes)
        return Start(
            statuses, pids, out, err, hung, notes.struck(), notes.shard(), notes.steps(), time.monotonic() - began
        )


def _started(
    world_size: int, arguments: Sequence[str], plan: tuple, notes: Notes
) -> tuple[list[int], list[int], str, str, bool]:
    with started(world_size, main_job, arguments, arm, plan) as job:
        end, first = time.monotonic() + BOUND_S, False
        while running := [process for process in job.processes if process.exitcode is None]:
            wait([process.sentinel for process in running], max(0, end - time.monotonic()))
            if not first and any(process.exitcode is not None for process in job.processes):
                end, first = time.monotonic() + TOGETHER_S, True
            elif time.monotonic() >= end:
                break
        for process in running:
            os.kill(process.pid, signal.SIGUSR2)  # write the stacks
        if running:
            time.sleep(1)
        job.kill()
        return [process.exitcode for process in job.processes], job.pids, job.out, job.err, bool(running)


def _launched(
    world_size: int, arguments: Sequence[str], plan: tuple, notes: Notes
) -> tuple[list[int], list[int], str, str, bool]:
    by = [
        sys.executable,
        "-m",
        "plrd_train.runtime.torchrun",
        "--standalone",
        "--nproc_per_node",
        str(world_size),
        "-m",
        "faults.rank",
    ]
    path = f"{ROOT}:{ROOT / 'tests'}"
    with launched([*by, json.dumps(plan), *arguments], PYTHONPATH=path, DS_ACCELERATOR="cpu") as run:
        status = run.status(BOUND_S)
        end = time.monotonic() + TOGETHER_S
        while (left := [pid for pid in notes.pids(world_size) if _runs(pid)]) and time.monotonic() < end:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return [status], notes.pids(world_size), run.out, run.err, bool(left)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

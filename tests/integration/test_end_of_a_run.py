"""However a run ends, it ends on all ranks, with one status and one word, and leaves its run_dir free."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults import fail_before
from processes import Job, main_job, run_job, started

from plrd_train.runtime import heartbeat

LONG = ("stages.tokens=12800000", "checkpoint.minutes=null")  # hours
WITHIN_S = 60
HOST = socket.gethostname()


def wait_for(condition: Callable[[], bool], seconds: float = 4 * WITHIN_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def steps(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@contextmanager
def in_training(
    ranks: int, arguments: list[str], run_dir: Path, prepare: Callable[..., None] | None = None
) -> Iterator[Job]:
    """The job, without a launcher, once it has trained some steps."""
    with started(ranks, main_job, arguments, prepare, ()) as job:
        wait_for(lambda: steps(run_dir) > 2 or any(process.exitcode is not None for process in job.processes))
        yield job


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_in_training(command, tmp_path, victim):
    run_dir = tmp_path / "run"
    with in_training(3, command(run_dir, *LONG), run_dir) as job:
        os.kill(job.pids[victim], signal.SIGKILL)
        assert job.statuses(WITHIN_S) == [-9 if rank == victim else 1 for rank in range(3)]
        assert job.err.count("\n") == 1, job.err
        assert f"error: rank {victim} ({HOST}, pid {job.pids[victim]}) died without a word" in job.err
        assert "the same command goes on from the last checkpoint" in job.err


def impatient(rank: int) -> None:
    assert heartbeat.SILENCE_S <= 20
    heartbeat.SILENCE_S = 5.0


def test_a_rank_that_stands_still_in_training_ends_the_others(command, tmp_path):
    """Within half a minute; here, where silence counts after a quarter of its time, within a quarter of a minute."""
    run_dir = tmp_path / "run"
    with in_training(2, command(run_dir, *LONG), run_dir, impatient) as job:
        os.kill(job.pids[1], signal.SIGSTOP)
        job.processes[0].join(15)
        assert job.processes[0].exitcode == 1
        assert (
            job.err.count("\n") == 1
            and f"error: rank 1 ({HOST}, pid {job.pids[1]}) gave no sign of life for " in job.err
        ), job.err


@pytest.mark.parametrize(
    ("engine", "broken"),
    [pytest.param("fsdp", (1,), marks=pytest.mark.slow), ("fsdp", (0, 1, 2)), ("zero3", (1,))],
    ids=str,
)
def test_a_defect_is_told_once(command, tmp_path, engine, broken):
    run_dir = tmp_path / "run"
    fault = "plrd_train.recover.loop:Trainer._step", 3, broken, "an oversight"
    with started(3, main_job, command(run_dir, *LONG, f"engine={engine}"), fail_before, fault) as job:
        assert job.statuses(4 * WITHIN_S) == [1, 1, 1]
        assert job.err.count("Traceback") == 1 and job.err.count("ValueError: an oversight") == 1, job.err
        last = job.err.splitlines()[-1]
        assert last in {
            f"error: rank {rank} ({HOST}, pid {job.pids[rank]}) failed by the exception above" for rank in broken
        }
    assert not (run_dir / ".lock").exists()


def children(pid: int) -> dict[int, int]:
    """RANK -> pid of the workers that the launcher `pid` has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                environment = dict(
                    item.split(b"=", 1) for item in (folder / "environ").read_bytes().split(b"\0") if b"=" in item
                )
                found[int(environment[b"RANK"])] = int(folder.name)
        except (OSError, KeyError):
            continue
    return found


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@contextmanager
def launched(
    arguments: list[str], run_dir: Path, module: str = "plrd_train.runtime.torchrun"
) -> Iterator[tuple[subprocess.Popen, dict[int, int]]]:
    """The job on two ranks under torchrun, once it has trained some steps: the launcher, and its workers by rank."""
    command = [sys.executable, "-m", module, "--standalone", "--nproc_per_node", "2", "-m", "plrd_train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = steps(run_dir)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        workers: dict[int, int] = {}
        try:
            wait_for(lambda: steps(run_dir) > before + 2 or launcher.poll() is not None)
            workers = children(launcher.pid)
            assert len(workers) == 2, launcher.communicate()
            yield launcher, workers
        finally:
            launcher.kill()
            for pid in workers.values():
                if not ended(pid):
                    os.kill(pid, signal.SIGKILL)


def test_the_launcher(command, tmp_path):
    """A second writer is refused on all ranks; USR1 to the launcher stops the run in order, a second interrupt ends it
    at once; and workers die with a launcher that is killed."""
    run_dir = tmp_path / "run"
    arguments = command(run_dir, *LONG)
    with launched(arguments, run_dir) as (launcher, workers):
        second = run_job(2, arguments)
        assert second.status == 2 and second.err.count("\n") == 1
        assert f"another run writes {run_dir} (host {HOST}, pid {workers[0]}, since " in second.err
        assert launcher.poll() is None

        launcher.send_signal(signal.SIGUSR1)
        out, err = launcher.communicate(timeout=WITHIN_S)
        assert launcher.returncode == 75 and err == "" and "stopped as asked" in out.splitlines()[-1]
        assert all(ended(pid) for pid in workers.values()) and not (run_dir / ".lock").exists()

    with launched(arguments, run_dir) as (launcher, workers):
        launcher.kill()
        wait_for(lambda: all(ended(pid) for pid in workers.values()), WITHIN_S)
        assert launcher.communicate()[1] == ""

    # The lock of what was killed is there, and binds nobody.
    assert json.loads((run_dir / ".lock").read_text())["pid"] == workers[0]
    with launched(arguments, run_dir) as (launcher, workers):
        os.kill(workers[1], signal.SIGSTOP)  # or else the run would have stopped in order before the second interrupt
        launcher.send_signal(signal.SIGINT)
        time.sleep(1)
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(WITHIN_S) == 130
        wait_for(lambda: all(ended(pid) for pid in workers.values()), WITHIN_S)

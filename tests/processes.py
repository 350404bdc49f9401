"""Real processes on gloo for tests: forked from a server that has imported everything once, which takes a second
instead of ten."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the forkserver imports DeepSpeed before an engine can tell it
_context.set_forkserver_preload(["tests.warm"])
TIMEOUT_S = 240
# from the end of the first rank that fails to that of the ranks which wait for it; launchers look about as often
GRACE_S = 0.3


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(world, *arguments)` on each of `world_size` ranks, one thread each, and return what they return,
    in rank order.

    `function` is a module-level one. The first exception of a rank is raised here with that rank's traceback.
    """
    pipes: dict[Any, int] = {}
    processes = []
    for environment in _environments(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_child, args=(theirs, environment, pickle.dumps((function, arguments))), daemon=True
        )
        process.start()
        theirs.close()
        pipes[ours] = len(processes)
        processes.append(process)
    results, end = {}, time.monotonic() + TIMEOUT_S
    try:
        while waiting := [pipe for pipe, rank in pipes.items() if rank not in results]:
            answered = wait(waiting, max(0, end - time.monotonic()))
            if not answered:
                raise TimeoutError(f"rank {pipes[waiting[0]]} of {world_size} did not answer within {TIMEOUT_S} s")
            for pipe in answered:
                rank = pipes[pipe]
                failed, value = pickle.loads(pipe.recv_bytes())
                if failed:
                    raise RuntimeError(f"rank {rank} of {world_size}:\n{value}")
                results[rank] = value
    finally:
        for process in processes:
            process.join(0 if len(results) < world_size else 10)
            process.kill()
    return [results[rank] for rank in range(world_size)]


@dataclass(frozen=True)
class Ended:
    """How a job ended: the exit status of the rank that failed first (0: none failed; -9: killed), and what all ranks
    wrote, in rank order."""

    status: int
    out: str
    err: str


def run_job(
    world_size: int, arguments: Sequence[str], prepare: Callable[..., None] | None = None, *prepared: Any
) -> Ended:
    """The main job, `plrd_train.__main__.main(arguments)`, on `world_size` ranks, one thread each; when one fails the
    rest are killed.

    `prepare(rank, *prepared)`, a module-level function, runs on each rank first: to break something in that process.
    """
    with started(world_size, main_job, arguments, prepare, prepared) as job:
        status, end = 0, time.monotonic() + TIMEOUT_S
        while running := [process for process in job.processes if process.exitcode is None]:
            wait([process.sentinel for process in running], max(0, end - time.monotonic()))
            failed = [process.exitcode for process in job.processes if process.exitcode]
            if failed and not status:
                status, end = failed[0], time.monotonic() + GRACE_S
            elif time.monotonic() >= end:
                break
        job.kill()
        if not status and running:
            raise TimeoutError(f"{arguments} did not end within {TIMEOUT_S} s:\n{job.out}\n{job.err}")
        return Ended(status, job.out, job.err)


@dataclass(frozen=True)
class Job:
    """Ranks that run, and what they have written so far."""

    processes: list[Any]
    folder: str

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    @property
    def out(self) -> str:
        return self._written("out")

    @property
    def err(self) -> str:
        return self._written("err")

    def _written(self, name: str) -> str:
        files = [Path(f"{self.folder}/{rank}.{name}") for rank in range(len(self.processes))]
        return "".join(file.read_text() for file in files if file.exists())

    def statuses(self, timeout: float) -> list[int | None]:
        """The exit status of each rank after at most `timeout` seconds; None: it still runs."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def started(world_size: int, function: Callable[..., None], *arguments: Any) -> Iterator[Job]:
    """`function(*arguments)`, a module-level one, runs on `world_size` ranks, one thread each; what is left of them is
    killed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job([], folder)
        try:
            for environment in _environments(world_size):
                payload = pickle.dumps((function, arguments))
                process = _context.Process(
                    target=_logged, args=(environment, f"{folder}/{environment['RANK']}", payload), daemon=True
                )
                process.start()
                job.processes.append(process)
            yield job
        finally:
            job.kill()


def _environments(world_size: int) -> list[dict[str, Any]]:
    """What a launcher sets for each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": rank, "LOCAL_RANK": rank, **place} for rank in range(world_size)]


def _enter(environment: dict[str, Any]) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    import torch

    torch.set_num_threads(1)


def _child(pipe: Any, environment: dict[str, Any], payload: bytes) -> None:
    _enter(environment)
    from plrd_train.runtime.place import Place
    from plrd_train.runtime.world import World

    try:
        world = World.open(Place.read())
        # By plain pickle: tensors travel as bytes, not as shared memory that ends with this process.
        function, arguments = pickle.loads(payload)
        answer = (False, function(world, *arguments))
        world.close()
    except BaseException:
        answer = (True, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))


def _logged(environment: dict[str, Any], log: str, payload: bytes) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    _enter(environment)
    function, arguments = pickle.loads(payload)
    function(*arguments)


def main_job(arguments: Sequence[str], prepare: Callable[..., None] | None, prepared: Sequence[Any]) -> None:
    """The main job on this rank. The report's pictures stay blank unless `prepare` is `draw`: they take half the time
    of a run of 12 steps."""
    from matplotlib.figure import Figure

    from plrd_train.__main__ import main
    from plrd_train.report import page as report

    report.family_figure = report.losses_figure = lambda *_: Figure(figsize=(1, 1))
    if prepare is not None:
        prepare(int(os.environ["RANK"]), *prepared)
    main(arguments)


def draw(rank: int) -> None:
    """For `run_job`'s `prepare`: the report's pictures are those that a user gets."""
    from plrd_train.report import page as report
    from plrd_train.report import plots

    report.family_figure, report.losses_figure = plots.family_figure, plots.losses_figure

"""Ranks that watch each other, on real processes: whoever is lost takes the others down, and one line says so."""

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist
from processes import Job, started

from plrd_train.errors import UserError
from plrd_train.runtime import heartbeat
from plrd_train.runtime.heartbeat.hub import Hub
from plrd_train.runtime.heartbeat.spoke import Spoke
from plrd_train.runtime.place import Place
from plrd_train.runtime.world import World

WITHIN_S = 30  # five times what the slowest of these takes; without the heartbeat it would be half an hour


def on_each(beat: float | None, what, *arguments) -> None:
    """Call `what(world, *arguments)` on this rank as the main job calls its work."""
    if beat is not None:
        heartbeat.BEAT_S, heartbeat.SILENCE_S = beat, 10 * beat
    world = World.open(Place.read())
    print("open", flush=True)
    try:
        what(world, *arguments)
    except Exception as error:  # what gloo raises where a rank is gone, among others
        own = isinstance(error, UserError)
        if world.heartbeat.first_to_fail(2 if own else 1, own=own):
            os.write(2, f"{error} of rank {world.rank}\n".encode())
        world.heartbeat.leave(2 if own else 1)
    world.close()


def wait_for_the_others(world) -> None:
    """Ranks wait in a collective for the last one, which never comes."""
    if world.rank == world.size - 1:
        time.sleep(1000)
    world.share(world.rank)


def when_open(job: Job) -> Job:
    """The job once all its ranks are at work."""
    end = time.monotonic() + WITHIN_S
    while job.out.count("open") < len(job.processes):
        assert time.monotonic() < end and not any(process.exitcode for process in job.processes), job.err
        time.sleep(0.05)
    return job


def only_line(job: Job) -> str:
    assert job.err.count("\n") == 1, job.err
    return job.err.strip()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_that_is_killed_takes_the_others_down(victim):
    with started(3, on_each, None, wait_for_the_others) as job:
        os.kill(when_open(job).pids[victim], signal.SIGKILL)
        assert job.statuses(WITHIN_S) == [-9 if rank == victim else 1 for rank in range(3)]
        assert only_line(job).startswith(
            f"error: rank {victim} ({socket.gethostname()}, pid {job.pids[victim]}) died without a word"
        )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_stands_still_takes_the_others_down(victim):
    with started(3, on_each, 0.2, wait_for_the_others) as job:
        os.kill(when_open(job).pids[victim], signal.SIGSTOP)
        others = [rank for rank in range(3) if rank != victim]
        deadline = time.monotonic() + WITHIN_S
        while any(job.processes[rank].exitcode is None for rank in others) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [job.processes[rank].exitcode for rank in others] == [1, 1]
        line = only_line(job)
        assert line.startswith(
            f"error: rank {victim} ({socket.gethostname()}, pid {job.pids[victim]}) gave no sign of life for "
        )
        os.kill(job.pids[victim], signal.SIGCONT)  # it finds itself given up
        assert job.statuses(WITHIN_S) == [1, 1, 1] and only_line(job) == line


def test_several_lost_ranks_are_named_in_one_line():
    with started(4, on_each, None, wait_for_the_others) as job:
        when_open(job)
        for rank in (1, 3):
            os.kill(job.pids[rank], signal.SIGKILL)
        assert job.statuses(WITHIN_S) == [1, -9, 1, -9]
        line = only_line(job)
        assert (
            line.startswith("error: ranks 1 (")
            and f"pid {job.pids[1]}), 3 (" in line
            and f"pid {job.pids[3]}) died" in line
        )


def hang(world, victim: int) -> None:
    """This rank does not come to the collective that the others wait in; all of them go on beating."""
    world.share(world.rank)
    world.heartbeat.expect(1.0)
    if world.rank == victim:
        time.sleep(1000)
    world.share(world.rank)


@pytest.mark.parametrize("victim", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_and_so_is_the_collective_that_waits_for_it(victim):
    with started(3, on_each, 0.2, hang, victim) as job:
        assert job.statuses(WITHIN_S) == [1, 1, 1]
        line = only_line(job)
        first, second, *_ = line.removeprefix("error: no progress for ").split("; ")
        assert (
            f"s: rank {victim} ({socket.gethostname()}, pid {job.pids[victim]}) is in " in first
            and ", pid" not in first.partition(" is in ")[2]
        )
        others = [rank for rank in range(3) if rank != victim]
        assert all(f"{rank} ({socket.gethostname()}, pid {job.pids[rank]})" in second for rank in others)
        assert second.endswith(", share)") and "waits in all_gather" in second


def slow_but_in_time(world) -> None:
    for _ in range(3):
        world.heartbeat.expect(1.0)
        time.sleep(0.6)
        world.share(world.rank)
    world.heartbeat.expect(None)
    time.sleep(1.5)


def test_progress_in_time_is_no_hang():
    with started(2, on_each, 0.2, slow_but_in_time) as job:
        assert job.statuses(WITHIN_S) == [0, 0] and job.err == ""


def hold_the_interpreter(world, seconds: float) -> None:
    if world.rank < 2:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # unlike CDLL, it does not let other threads of Python run
    world.share(world.rank)


def test_code_that_holds_the_interpreter_for_a_while_is_not_taken_for_dead():
    with started(3, on_each, 0.4, hold_the_interpreter, 2.0) as job:
        assert job.statuses(WITHIN_S) == [0, 0, 0] and job.err == ""


def slow_rank_0(world) -> None:
    if world.rank == 0:
        time.sleep(1.0)
        print("rank 0 is done", flush=True)


def test_in_the_end_ranks_wait_for_rank_0_and_for_no_other():
    with started(3, on_each, None, slow_rank_0) as job:
        when_open(job)
        assert job.statuses(0.5) == [None, None, None]
        assert job.statuses(WITHIN_S) == [0, 0, 0] and job.err == "" and "rank 0 is done" in job.out


def fail(world, how: str, ranks: tuple[int, ...]) -> None:
    """These ranks fail while the others wait in a collective."""
    if world.rank in ranks:
        raise UserError(how) if how == "mistake" else ValueError(how)
    world.share(world.rank)


@pytest.mark.parametrize(
    ("how", "ranks"),
    [
        *(("defect", ranks) for ranks in ((0,), (1,), (0, 1, 2))),
        ("mistake", (1,)),
        *(pytest.param("mistake", ranks, marks=pytest.mark.slow) for ranks in ((0,), (0, 1, 2))),
    ],
    ids=str,
)
def test_the_rank_that_fails_first_says_why_and_no_other(how, ranks):
    with started(3, on_each, None, fail, how, ranks) as job:
        assert set(job.statuses(WITHIN_S)) == {1 if how == "defect" else 2}
        assert only_line(job) in {f"{how} of rank {rank}" for rank in ranks}


def leave(world) -> None:
    if world.rank == 1:
        world.heartbeat.leave(130)
    world.share(world.rank)


def test_a_rank_that_leaves_takes_the_others_along_without_a_word():
    with started(3, on_each, None, leave) as job:
        assert job.statuses(WITHIN_S) == [130, 130, 130] and job.err == ""


def abort(world) -> None:
    if world.rank == 0:
        threading.Thread(target=world.heartbeat.abort, args=("the lock is lost",)).start()
    dist.all_reduce(torch.zeros(1)) if world.rank else time.sleep(1000)


def test_any_thread_can_end_the_run():
    with started(3, on_each, None, abort) as job:
        assert job.statuses(WITHIN_S) == [1, 1, 1] and only_line(job) == "error: the lock is lost"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(heartbeat, "JOIN_S", 2.0)
    return Hub(2, "127.0.0.1")


def test_strangers_who_call_are_not_heard(hub):
    port = hub.address.port
    silent, rude, wrong = (socket.create_connection(("127.0.0.1", port)) for _ in range(3))
    rude.send(b"GET / HTTP/1.1\r\n\r\n")
    wrong.send(b'{"token": "guessed", "rank": 1, "name": "me"}\n')
    spoke = []
    caller = threading.Thread(target=lambda: spoke.append(Spoke(1, hub.address)))
    caller.start()
    hub.start()
    caller.join()
    for stranger in (silent, rude, wrong):
        stranger.settimeout(WITHIN_S)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(10) == b""
        stranger.close()
    hub.close()
    spoke[0].close()


def test_ranks_that_do_not_reach_each_other_are_named(hub):
    with pytest.raises(
        UserError,
        match=rf"rank 1 does not reach rank 0 \(.*, pid {os.getpid()}\) at 127.0.0.1:{hub.address.port} or .*ports",
    ):
        hub.start()
    hub._listener.close()
    with pytest.raises(UserError, match=r"rank 1 does not reach rank 0 .* at 127.0.0.1:"):
        Spoke(1, hub.address)

"""One writer for a run_dir, whatever became of the one before."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faults import limit_files
from processes import run_ranks, started

from plrd_train.errors import UserError
from plrd_train.runtime import lock
from plrd_train.runtime.lock import Lock, locked

WITHIN_S = 30


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A tenth of the real times, so that what is watched takes three seconds and a touch comes every half second."""
    for name in ("TOUCH_S", "LOOK_S", "CONFIRM_S"):
        monkeypatch.setattr(lock, name, getattr(lock, name) / 10)


def never(message: str) -> None:
    raise AssertionError(message)


def content(run_dir: Path) -> dict:
    return json.loads((run_dir / ".lock").read_text())


def write_lock(run_dir: Path, **values) -> None:
    """A lock of another host, changed by `values`."""
    run_dir.mkdir(exist_ok=True)
    holder = {
        "host": "node-b",
        "pid": os.getpid(),
        "place": "elsewhere",
        "began": "1",
        "since": "2026-01-02 03:04:05",
        "token": "theirs",
    }
    (run_dir / ".lock").write_text(json.dumps({**holder, **values}))


def hold(run_dir: Path) -> None:
    Lock(run_dir, never).acquire()
    print("held", flush=True)
    time.sleep(1000)


def wait_for(condition) -> None:
    end = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_is_there_while_it_is_held_and_gone_afterwards(tmp_path):
    run_dir = tmp_path / "runs" / "one"
    one = Lock(run_dir, never)
    one.acquire()
    assert content(run_dir)["pid"] == os.getpid() and content(run_dir)["host"] == socket.gethostname()
    first = (run_dir / ".lock").stat().st_mtime_ns
    wait_for(lambda: (run_dir / ".lock").stat().st_mtime_ns > first)
    one.release()
    assert not run_dir.exists()  # nothing else came into it
    run_dir.mkdir()
    (run_dir / "config.yaml").touch()
    two = Lock(run_dir, never)
    two.acquire()
    two.release()
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]


def is_dead(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_second_writer_on_the_same_host_is_refused_at_once_and_takes_over_from_one_that_was_killed(tmp_path):
    with started(1, hold, tmp_path) as job:
        wait_for(lambda: "held" in job.out)
        for signalled in (None, signal.SIGSTOP):  # one that stands still is a holder, too
            if signalled:
                os.kill(job.pids[0], signalled)
            with pytest.raises(
                UserError,
                match=rf"another run writes {tmp_path} \(host {socket.gethostname()}, pid {job.pids[0]}, since 20",
            ):
                Lock(tmp_path, never).acquire()
        os.kill(job.pids[0], signal.SIGKILL)
        wait_for(lambda: is_dead(job.pids[0]))  # whether or not its parent has noticed
        heir = Lock(tmp_path, never)
        start = time.monotonic()
        heir.acquire()
        assert time.monotonic() - start < lock.LOOKS * lock.LOOK_S / 2 and content(tmp_path)["pid"] == os.getpid()
        heir.release()
    assert list(tmp_path.iterdir()) == []


def test_the_pid_of_a_dead_holder_may_be_another_process_now(tmp_path):
    write_lock(tmp_path, place=lock._place(), began="1")
    Lock(tmp_path, never).acquire()
    assert content(tmp_path)["token"] != "theirs"


def test_a_holder_on_another_host_that_lives_is_seen_by_its_touch(tmp_path):
    write_lock(tmp_path)
    touches = threading.Timer(0.5, os.utime, [tmp_path / ".lock"])
    touches.start()
    with pytest.raises(UserError, match=r"host node-b, pid \d+, since 2026-01-02 03:04:05\); wait for its end"):
        Lock(tmp_path, never).acquire()
    assert content(tmp_path)["token"] == "theirs" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "text",
    [None, pytest.param("", marks=pytest.mark.slow), '{"host": "node-b", "pi'],
    ids=["whole", "empty", "cut short"],
)
def test_a_holder_on_another_host_that_lost_its_power_is_replaced(tmp_path, text, capsys):
    write_lock(tmp_path)
    if text is not None:
        (tmp_path / ".lock").write_text(text)
    ours = Lock(tmp_path, never)
    ours.acquire()
    assert (
        content(tmp_path)["pid"] == os.getpid() and "looking for 3 s whether that run lives" in capsys.readouterr().out
    )
    ours.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_goes_away_while_it_is_watched_is_free(tmp_path):
    write_lock(tmp_path)
    threading.Timer(0.3, (tmp_path / ".lock").unlink).start()
    start = time.monotonic()
    Lock(tmp_path, never).acquire()
    assert time.monotonic() - start < 2


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root, for a process namespace")
def test_a_process_that_cannot_be_looked_up_is_watched(tmp_path):
    """As on another host: pids of another process namespace mean nothing here, where that pid may not be there at
    all."""
    script = (
        "import sys; from pathlib import Path; from plrd_train.runtime import lock; lock.TOUCH_S = 0.5\n"
        "lock.Lock(Path(sys.argv[1]), print).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    command = [
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        "-c",
        script,
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            assert content(tmp_path)["pid"] < 10
            with pytest.raises(UserError, match="another run writes"):
                Lock(tmp_path, never).acquire()
        finally:
            holder.kill()
    Lock(tmp_path, never).acquire()
    assert content(tmp_path)["pid"] == os.getpid()


def test_of_many_that_find_it_free_one_gets_it(tmp_path):
    for _ in range(10):
        write_lock(tmp_path, place=lock._place())
        got, refused = [], []

        def contend(got=got, refused=refused) -> None:
            mine = Lock(tmp_path, never)
            try:
                mine.acquire()
                got.append(mine)
            except UserError:
                refused.append(mine)

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(got), len(refused)) == (1, 7)
        got[0].release()
        assert list(tmp_path.iterdir()) == []


def test_a_holder_that_was_taken_over_learns_of_it_and_leaves_the_lock_alone(tmp_path):
    said = []
    ours = Lock(tmp_path, said.append)
    ours.acquire()
    write_lock(tmp_path)
    wait_for(lambda: said)
    assert said[0].startswith(f"run_dir: another run took over {tmp_path} (host node-b, pid {os.getpid()}, ")
    ours.release()
    assert content(tmp_path)["token"] == "theirs"


def test_a_lock_that_somebody_removed_is_put_back(tmp_path):
    ours = Lock(tmp_path, never)
    ours.acquire()
    (tmp_path / ".lock").unlink()
    wait_for((tmp_path / ".lock").exists)
    ours.release()
    assert list(tmp_path.iterdir()) == []


def hold_on_a_full_disk(run_dir: Path) -> None:
    limit_files(0, 100)
    try:
        Lock(run_dir, never).acquire()
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", [path.name for path in run_dir.iterdir()], flush=True)


def test_a_disk_that_is_full_keeps_no_half_of_it(tmp_path):
    with started(1, hold_on_a_full_disk, tmp_path) as job:
        assert job.statuses(WITHIN_S) == [0] and job.out == f"{tmp_path}/.lock: File too large []\n"


def lock_twice(world, run_dir: Path) -> list[str]:
    said = []
    with locked(run_dir, world):
        try:
            with locked(run_dir, world):
                said.append("held twice")
        except UserError as error:
            said.append(str(error))
    world.share(None)
    return [*said, str((run_dir / ".lock").exists())]


def test_all_ranks_hold_it_together_and_are_refused_together(tmp_path):
    (tmp_path / "run").mkdir()
    one, other = run_ranks(2, lock_twice, tmp_path / "run")
    assert one == other and "another run writes" in one[0] and one[1] == "False"

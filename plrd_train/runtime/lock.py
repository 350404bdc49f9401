"""One writer for a run_dir, on any file system and from any host: a lock file that the holder refreshes.

The kernel's locks (flock, fcntl) end with their process. On a shared file system, though, they may be refused, may hold
on one host alone (Lustre's `localflock`), or may outlive a host that lost its power (NFS 3). So the lock is a file.
Exclusive creation is atomic on NFS and Lustre. The file names its holder, which touches it every five seconds. A stale
lock, whose holder ended without removing it, is free:

- In the same process namespace and boot, the holder's process is looked up.
- Elsewhere the lock is polled, once a second: after thirty polls without a touch it is free. Polls are counted, not
  seconds. So a file server that hangs for a while makes no lock stale, and no two clocks are compared. The ranks of a
  run that lost rank 0 leave sooner than that (plrd_train.runtime.heartbeat).

Two processes that find the same stale lock may both replace it. The later one wins, so each reads the lock again before
it goes on. A holder that was suspended until another took over sees that at its next touch, and ends.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from plrd_train.errors import UserError
from plrd_train.runtime.world import World
from plrd_train.tracking import console

FILE = ".lock"
TOUCH_S = 5.0
LOOK_S = 1.0
LOOKS = 30
CONFIRM_S = 0.5


@contextlib.contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """Hold the lock of `run_dir` inside the block. A collective. Raises UserError, on all ranks, where another run
    holds it."""
    lock = Lock(run_dir, world.heartbeat.abort)
    world.on_main(lock.acquire)
    try:
        yield
    except BaseException:
        # Keep the original error; a stale lock is harmless.
        with contextlib.suppress(OSError):
            lock.release()
        raise
    lock.release()


class Lock:
    """The lock of `run_dir`, held by one process. When another process has taken it over, a thread calls `on_loss` with
    the message."""

    def __init__(self, run_dir: Path, on_loss: Callable[[str], Any]):
        self._run_dir, self._file, self._on_loss = run_dir, run_dir / FILE, on_loss
        self._token = secrets.token_hex(8)
        self._made_folder = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock, which makes `run_dir`. Raises UserError where another process holds it, OSError where files
        cannot be written there."""
        self._made_folder = not self._run_dir.exists()
        self._run_dir.mkdir(parents=True, exist_ok=True)
        while not self._created():
            found = self._look()
            if found is not None and self._is_free(found) and self._replaced(found):
                break
        self._thread.start()

    def release(self) -> None:
        """Release the lock if it is held, and remove the `run_dir` if it is empty and was made by `acquire`."""
        if not self._thread.is_alive():
            return
        self._released.set()
        self._thread.join()
        if self._mine(self._look()):
            self._file.unlink(missing_ok=True)
        if self._made_folder:
            with contextlib.suppress(OSError):
                self._run_dir.rmdir()

    def _created(self) -> bool:
        try:
            self._write(self._file)
        except FileExistsError:
            return False
        return True

    def _write(self, file: Path) -> None:
        """Create `file`, or raise FileExistsError."""
        pid = os.getpid()
        holder = {
            "host": socket.gethostname(),
            "pid": pid,
            "place": _place(),
            "began": _began(pid),
            "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        }
        opened = file.open("x")
        try:
            with opened:
                json.dump({**holder, "token": self._token}, opened)
        except OSError as error:  # a full disk
            file.unlink()
            raise OSError(error.errno, error.strerror, str(file)) from None

    def _look(self) -> tuple[dict[str, Any], int] | None:
        """The content of the lock file and its mtime in ns; None where there is no file. NFS asks its server only when
        a file is opened."""
        try:
            with self._file.open() as opened:
                touched = os.fstat(opened.fileno()).st_mtime_ns
                return json.load(opened), touched
        except FileNotFoundError:
            return None
        except ValueError:
            return {}, touched  # still being written, or truncated when its host went down

    def _mine(self, found: tuple[dict[str, Any], int] | None) -> bool:
        return found is not None and found[0].get("token") == self._token

    def _is_free(self, found: tuple[dict[str, Any], int]) -> bool:
        """Whether the lock's holder has ended. Raises UserError where it has not."""
        holder = found[0]
        if holder.get("place") == _place():
            if _runs(holder["pid"], holder["began"]):
                raise self._held(holder)
            return True
        console.say(f"{self._file} is held ({_who(holder)}); looking for {LOOKS * LOOK_S:.0f} s whether that run lives")
        for _ in range(LOOKS):
            time.sleep(LOOK_S)
            now = self._look()
            if now is None:
                return False
            if now != found:
                raise self._held(now[0])
        return True

    def _held(self, holder: Mapping[str, Any]) -> UserError:
        return UserError(
            f"run_dir: another run writes {self._run_dir} ({_who(holder)}); wait for its end or stop it, or choose "
            "another run_dir"
        )

    def _replaced(self, found: tuple[dict[str, Any], int]) -> bool:
        draft = self._file.with_name(f"{FILE}.{self._token}")
        self._write(draft)
        if self._look() != found:
            draft.unlink()
            return False
        draft.replace(self._file)
        time.sleep(CONFIRM_S)
        return self._mine(self._look())

    def _keep(self) -> None:
        while not self._released.wait(TOUCH_S):
            with contextlib.suppress(OSError):  # the file server is away for now: the run itself waits for it, too
                found = self._look()
                if found is None:
                    self._created()  # somebody removed it; if another process holds it now, the next turn sees that
                elif self._mine(found):
                    os.utime(self._file)
                else:
                    self._on_loss(
                        f"run_dir: another run took over {self._run_dir} ({_who(found[0])}) while this one stood still"
                    )
                    return


def _who(holder: Mapping[str, Any]) -> str:
    return (
        f"host {holder.get('host', 'unknown')}, pid {holder.get('pid', 'unknown')}, since "
        f"{holder.get('since', 'just now')}"
    )


def _place() -> str:
    """The scope in which a pid is unique: boot id and process namespace; the host's name where there is no /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _began(pid: int) -> str | None:
    """The start time of the process in clock ticks, which tells it from a later process of the same pid. None where it
    has ended, or where there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _runs(pid: int, began: str | None) -> bool:
    """Whether the process `pid` that started at `began` still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's, of which /proc may show nothing
    return _began(pid) == began

"""What a fault does, inside the rank that it strikes. The other ranks only take notes."""

import contextlib
import ctypes
import errno
import faulthandler
import os
import random
import resource
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faults import before

if TYPE_CHECKING:
    from faults.kinds import Fault

SMALL = 1 << 28  # bytes; a file system up to this size is one to be filled
FOLDERS = ("", "checkpoints", "members")
WAITS_S = (0.05, 0.1)  # for a shard to come back
_LIMIT = 4096  # bytes a file, where the disk is not filled itself
_DAC_OVERRIDE = 1  # linux/capability.h


class Notes:
    """What the ranks of a start leave for the campaign to read, in a folder that no fault touches."""

    def __init__(self, folder: Path):
        self._folder = folder

    def note(self, name: str, text: str) -> None:
        """Add `text` in one write."""
        descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, text.encode())
        os.close(descriptor)

    def _read(self, name: str) -> str:
        path = self._folder / name
        return path.read_text() if path.exists() else ""

    def pids(self, world_size: int) -> list[int]:
        return [int(pid) for rank in range(world_size) if (pid := self._read(f"pid-{rank}"))]

    def steps(self) -> list[int]:
        return [int(step) for step in self._read("steps").split()]

    def struck(self) -> bool:
        return bool(self._read("struck"))

    def shard(self) -> str:
        return self._read("shard")


def arm(rank: int, values: tuple | None, run_dir: str, corpus: str, notes_folder: str) -> None:
    """Let the fault of these `values` happen in this start, whose rank this is."""
    from faults.kinds import SHARD_KINDS, WANDB, Fault
    from plrd_train.data import loader

    notes = Notes(Path(notes_folder))
    faulthandler.register(signal.SIGUSR2, file=sys.stderr)
    notes.note(f"pid-{rank}", str(os.getpid()))
    if rank == 0:
        _note_steps(notes)
    if values is None:
        return
    fault = Fault(*values)
    if fault.kind == "a read-only folder":
        _obey_permissions()
    if fault.kind == WANDB:
        os.environ |= {
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_BASE_URL": "http://127.0.0.1:9",
            "WANDB_INIT_TIMEOUT": "1",
        }
    if rank != fault.rank:
        return
    if fault.kind in SHARD_KINDS:
        loader.WAITS_S = WAITS_S
        _break_shard(fault, Path(corpus).resolve(), notes)
        return
    world_size = int(os.environ["WORLD_SIZE"])

    def strike() -> None:
        notes.note("struck", "x")
        _strike(fault, Path(run_dir), notes.pids(world_size))

    def at_the_call() -> None:
        if fault.delay:
            timer = threading.Timer(fault.delay, strike)
            timer.daemon = True
            timer.start()
        else:
            strike()

    before(fault.where, fault.call, at_the_call)


def _strike(fault: "Fault", run_dir: Path, pids: list[int]) -> None:
    from faults.kinds import LAUNCHER, WANDB

    if fault.kind in ("SIGTERM", WANDB):
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault.kind == "no room":
        fill(run_dir.parent) if is_small(run_dir.parent) else _limit_files(pids)
    elif fault.kind == "a read-only folder":
        folders = [folder for name in FOLDERS if (folder := run_dir / name).is_dir()]
        folder = random.Random(fault.seed).choice(folders)
        folder.chmod(0o555)
    elif fault.kind == LAUNCHER:
        os.kill(os.getppid(), signal.SIGKILL)
    else:
        for pid in pids if fault.kind == "kill -9 of all ranks" else ():
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _note_steps(notes: Notes) -> None:
    from plrd_train.recover.loop import Trainer

    whole = Trainer._step

    def noted(self: Trainer, *arguments: Any) -> Any:
        notes.note("steps", f"{self.counters.steps} ")
        return whole(self, *arguments)

    Trainer._step = noted  # type: ignore[method-assign]


def is_small(folder: Path) -> bool:
    room = os.statvfs(folder)
    return room.f_blocks * room.f_frsize <= SMALL


def fill(folder: Path) -> None:
    """Leave no room on the file system of `folder`."""
    with (folder / "ballast").open("wb") as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12):
            while True:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    break


def _limit_files(pids: list[int]) -> None:
    """No file of these processes may become larger than _LIMIT: writing on fails, as on a full disk."""
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_LIMIT, _LIMIT))


def _obey_permissions() -> None:
    """Let the permissions of files hold for this process, even root's: take the capability to pass over them from
    it."""
    libc = ctypes.CDLL(None, use_errno=True)
    # _LINUX_CAPABILITY_VERSION_3, this thread: before it starts any other.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (
        ctypes.c_uint32 * 6
    )()  # effective, permitted and inheritable, of the capabilities below 32 and then of those above
    if libc.capget(header, sets) == 0:
        sets[0] &= ~(1 << _DAC_OVERRIDE)
        libc.capset(header, sets)


def _break_shard(fault: "Fault", corpus: Path, notes: Notes) -> None:
    """Take a training shard away before it is opened, or let reading it fail: by a link to the memory of this process,
    which at address 0 gives an I/O error."""
    opened = iter(range(fault.call + 1))
    armed = threading.Lock()

    def look(event: str, arguments: tuple) -> None:
        if event != "open" or not isinstance(arguments[0], str) or armed.locked():
            return
        if (
            arguments[0].startswith(f"{corpus}/train/")
            and next(opened, None) == fault.call
            and armed.acquire(blocking=False)
        ):
            shard = Path(arguments[0])
            notes.note("shard", str(shard))
            notes.note("struck", "x")
            shard.rename(shard.with_name(shard.name + ".away"))
            if fault.kind == "a shard cannot be read":
                shard.symlink_to("/proc/self/mem")

    sys.addaudithook(look)


def mend(run_dir: Path, corpus: Path) -> None:
    """Take back what a fault did to disks, folders and shards."""
    (run_dir.parent / "ballast").unlink(missing_ok=True)
    for folder in (run_dir / name for name in FOLDERS):
        if folder.is_dir():
            folder.chmod(folder.stat().st_mode | stat.S_IRWXU)
    for away in corpus.rglob("*.away"):
        shard = away.with_suffix("")
        shard.unlink(missing_ok=True)
        away.rename(shard)

"""Ways to break a rank of a job in the middle, for `processes.run_job`."""

import errno
import importlib
import os
import resource
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any


def before(where: str, call: int, instead: Callable[[], Any]) -> None:
    """Let `instead` happen at the `call`-th call, from 0, of the function `where`, "module:name" or
    "module:Class.name"."""
    module, _, path = where.partition(":")
    owner_name, _, name = path.rpartition(".")
    owner = importlib.import_module(module)
    owner = getattr(owner, owner_name) if owner_name else owner
    whole, calls = getattr(owner, name), iter(range(call + 1))

    def broken(*arguments: Any, **named: Any) -> Any:
        if next(calls, None) == call:
            instead()
        return whole(*arguments, **named)

    setattr(owner, name, broken)


def kill_before(rank: int, where: str, call: int) -> None:
    """Rank 0 is killed, as by `kill -9`, in place of that call."""
    if rank == 0:
        before(where, call, lambda: os.kill(os.getpid(), signal.SIGKILL))


def signal_before(rank: int, where: str, call: int, number: int, on: int = 0) -> None:
    """Rank `on` sends itself a signal before that call."""
    if rank == on:
        before(where, call, lambda: os.kill(os.getpid(), number))


def fail_before(rank: int, where: str, call: int, ranks: tuple[int, ...], message: str) -> None:
    """These ranks meet a defect in place of that call: a ValueError."""

    def fail() -> None:
        raise ValueError(message)

    if rank in ranks:
        before(where, call, fail)


def touch_before(rank: int, where: str, call: int, file: Path) -> None:
    """`file` is there from that call of rank 0 on."""
    if rank == 0:
        before(where, call, file.touch)


def limit_files(rank: int, size: int) -> None:
    """No file of this process may become larger than `size` bytes: writing on fails as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def refuse_fsync(rank: int, code: int, of_folders: bool) -> None:
    """os.fsync fails with `code` for folders, or for files, and for the other kind works as before."""
    whole = os.fsync

    def refused(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) == of_folders:
            raise OSError(code, os.strerror(code))
        whole(handle)

    os.fsync = refused


def on_a_share(rank: int, umask: int) -> None:
    """This umask, and folders that cannot be synced, as on CIFS."""
    os.umask(umask)
    refuse_fsync(rank, errno.EINVAL, of_folders=True)


def offline_hub(rank: int, cache: Path) -> None:
    """The hub is what lies in `cache`."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    huggingface_hub.constants.HF_HUB_CACHE = str(cache)

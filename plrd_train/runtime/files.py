"""Files that are written whole or not at all, with the permissions of the umask, and synced where the file system
can."""

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

# What file systems answer that cannot sync a folder, as CIFS and VirtualBox's shared folders.
_CANNOT_SYNC = {
    *(errno.EINVAL, errno.EBADF, errno.EISDIR),
    *(errno.EACCES, errno.EPERM),
    *(errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP),
}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError inside the block the file name `path` if it has none, as errors of write() have."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes into. When the block ends without an error it replaces `path` atomically, so that a reader
    sees the old content or the new. Raises OSError that names a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        with _created(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file by `content`, text in UTF-8, as `replacing` does it."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as file:
        file.write(data)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write contiguous `tensors` in host memory as safetensors, without a copy. Raises OSError that names `path`."""
    # safetensors replaces this file by a temporary one of mode 600, so the mode is restored below. It is read from a
    # file created here: that is how the umask and the folder's access list show. Reading the umask itself would set it
    # for all threads.
    with _created(path) as file:
        mode = _mode(os.fstat(file.fileno()))
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None
    if _mode(path.stat()) != mode:  # where all files have one mode, some file systems refuse chmod
        path.chmod(mode)


def sync(path: Path) -> None:
    """fsync a file or a folder. Does nothing for a folder on a file system that cannot sync folders. Raises OSError
    that names `path`."""
    try:
        with naming(path):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC or not path.is_dir():
            raise


def _created(path: Path) -> BinaryIO:
    """A new file, open for writing. One that a killed process left is removed first: it may have another mode."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def _mode(status: os.stat_result) -> int:
    return stat.S_IMODE(status.st_mode)

"""Files that others rely on: whole or absent, with the permissions that the umask leaves, and synced where the file
system can do that."""

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
    """Inside, an OSError that names no file, as one of writing does not, becomes one that names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes into, which takes the place of `path` at once when the block ends well: a reader, and a
    restart, sees the old content or the new, never a part. Raises OSError, naming a file."""
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
    """Write contiguous `tensors`, which lie in host memory and are not copied there, as safetensors. Raises OSError,
    naming `path`."""
    # safetensors puts a temporary file of mode 600 in the place of this one. Only a file created by open tells what the
    # umask, or the folder's own list of access rights, leaves: the umask cannot be read without setting it, for all
    # threads.
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
    """Let a file, or the names in a folder, outlive a loss of power. Where the file system can do that for no folder,
    nothing happens: a rename is all that can be had there. Raises OSError, naming `path`."""
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
    """A new file, open for writing; what a killed process left in its place may have had another mode."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def _mode(status: os.stat_result) -> int:
    return stat.S_IMODE(status.st_mode)

"""Files that others rely on: whole or absent, readable for whom the umask says, synced as far as the file system can,
and named in errors."""

import errno
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from faults import refuse_fsync
from safetensors.torch import load_file

from plrd_train.runtime.files import replacing, save_tensors, sync, write_atomically

TENSORS = {"up": torch.arange(6.0).view(2, 3), "down": torch.ones(3, dtype=torch.bfloat16)}
WRITERS = {
    "text": lambda path: write_atomically(path, "text"),
    "tensors": lambda path: save_tensors(TENSORS, path, {"format": "pt"}),
}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def limit(size: int) -> Iterator[None]:
    """No file may become larger than `size` bytes: writing on fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "it"
    write_atomically(path, "old")
    with path.open() as reader:
        write_atomically(path, "new")
        assert reader.read() == "old" and path.read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "part of it" * 10_000 + "\ud800")

    def half_of_it() -> None:
        with replacing(path) as file:
            file.write(b"part of it" * 10_000)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_of_it()
    assert path.read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_permissions_are_those_that_the_umask_leaves(write, mask, tmp_path):
    path = tmp_path / "it"
    with umask(mask):
        write(path)
    assert mode(path) == 0o666 & ~mask
    with umask(0o022):  # over what is there, and over what a run under another umask left when it was killed
        (tmp_path / ".it.tmp").touch(mode=0o600)
        write(path)
    assert mode(path) == 0o644


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_with_access_rules_of_its_own_has_them_for_every_file(write, tmp_path):
    """A default ACL, as shared project folders have them, counts in place of the umask: here all rights for the group,
    none for others."""
    entry = struct.Struct("<HHI").pack
    nobody = 2**32 - 1
    acl = struct.pack("<I", 2) + entry(1, 7, nobody) + entry(4, 7, nobody) + entry(32, 0, nobody)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    with umask(0o077):
        write(tmp_path / "it")
    assert mode(tmp_path / "it") == 0o660


def test_tensors_are_read_back(tmp_path):
    save_tensors(TENSORS, tmp_path / "it", {"format": "pt"})
    found = load_file(tmp_path / "it")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


LARGE = {
    "text": lambda path: write_atomically(path, "text" * 10_000),
    "tensors": lambda path: save_tensors({"up": torch.zeros(10_000)}, path, {}),
}


@pytest.mark.parametrize("write", LARGE.values(), ids=LARGE)
def test_without_room_the_file_is_named(write, tmp_path):
    with limit(5000), pytest.raises(OSError, match="too large") as error:
        write(tmp_path / "it")
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path / "it"))


def refusing(monkeypatch, code: int, of_folders: bool) -> None:
    monkeypatch.setattr(os, "fsync", os.fsync)  # so that the own one comes back
    refuse_fsync(0, code, of_folders)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_synced_is_left_in_peace(code, tmp_path, monkeypatch):
    """os.fsync refuses folders here, as CIFS and others let it do."""
    (tmp_path / "it").touch()
    refusing(monkeypatch, code, of_folders=True)
    sync(tmp_path)
    sync(tmp_path / "it")


@pytest.mark.parametrize(
    ("code", "of_folders", "name"),
    [
        (errno.EIO, True, ""),
        (errno.ENOSPC, True, ""),
        (errno.EIO, False, "it"),
        (errno.ENOSPC, False, "it"),
        (errno.EINVAL, False, "it"),
    ],
)
def test_what_else_fails_in_syncing_is_an_error_that_names_the_place(code, of_folders, name, tmp_path, monkeypatch):
    (tmp_path / "it").touch()
    refusing(monkeypatch, code, of_folders)
    with pytest.raises(OSError, match=os.strerror(code)) as error:
        sync(tmp_path / name)
    assert (error.value.errno, error.value.filename) == (code, str(tmp_path / name))
    if not of_folders:
        with pytest.raises(OSError, match=os.strerror(code)) as error:
            write_atomically(tmp_path / "it", "text")
        assert (error.value.errno, error.value.filename) == (code, str(tmp_path / "it"))

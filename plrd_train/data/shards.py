"""Open one shard, a local path or an `hf://` URL, and decompress it: plain, gzip or zstd."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import zstandard
from huggingface_hub.errors import HfHubHTTPError

# Errors of a failing disk, network or hub. The HTTP client's own error class changes between versions of the hub
# library, but is always a base of HfHubHTTPError.
READ_ERRORS: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
# Errors of compressed bytes that are damaged or end early.
DAMAGED: tuple[type[BaseException], ...] = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)

_READ_BYTES = 1 << 17


@contextlib.contextmanager
def open_shard(shard: str) -> Iterator[Iterable[bytes]]:
    """Yield the lines of a shard, decompressed by its suffix (.gz, .zst; any other is plain).

    Raises one of READ_ERRORS if the shard cannot be opened or read (FileNotFoundError if it is missing). Reading raises
    one of DAMAGED if the shard is truncated or damaged.
    """
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_open_bytes(shard))
        if shard.endswith(".zst"):
            yield stack.enter_context(io.BufferedReader(_ZstdReader(source), _READ_BYTES))
        elif shard.endswith(".gz"):
            yield stack.enter_context(gzip.open(source))
        else:
            yield source


def _open_bytes(shard: str) -> BinaryIO:
    if not shard.startswith("hf://"):
        return open(shard, "rb")
    # It streams, and reconnects after a dropped connection. Importing it takes seconds, so the import is here.
    from datasets.utils.file_utils import xopen

    return xopen(shard, "rb")


class _ZstdReader(io.RawIOBase):
    """The decompressed bytes of all frames of `source`.

    Raises EOFError for a truncated file; zstandard's own reader treats it as a shorter file.
    """

    def __init__(self, source: BinaryIO):
        self._chunks = _zstd_chunks(source)
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._ready:
            self._ready = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _zstd_chunks(source: BinaryIO) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # the largest window that `zstd --long` writes
    frame, whole = decompressor.decompressobj(), False
    while data := (frame.unused_data if frame.eof else b"") or source.read(_READ_BYTES):
        if frame.eof:
            frame = decompressor.decompressobj()
        if out := frame.decompress(data):
            yield out
        whole = frame.eof
    if not whole:
        raise EOFError("the last zstd frame is cut short")

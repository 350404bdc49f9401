"""Read back what a W&B run wrote: a LevelDB log of protocol buffers, parsed here without W&B's own reader."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER, _FULL, _LAST = 32768, 7, 1, 4


def records(path: Path) -> Iterator[Any]:
    """Yield the Record messages of a .wandb file."""
    # The file begins with a header of its own, as long as a chunk's.
    data, position, message = (path.read_bytes(), _HEADER, b"")
    while position + _HEADER <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < _HEADER:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            return
        if position + _HEADER + length > len(data):  # not all of it is written yet
            return
        message += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record


def runs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))


def finished(path: Path) -> list[Any]:
    """The records of a run that was closed: W&B's own process writes the last of them a few milliseconds after `finish`
    has returned."""
    deadline = time.monotonic() + 20
    while True:
        found = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline, f"{path} never ends"
        time.sleep(0.02)


def history(path: Path) -> list[dict[str, Any]]:
    """The rows that a closed run logged, without W&B's own names."""
    rows = []
    for record in finished(path):
        if record.WhichOneof("record_type") == "history":
            names = [(item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item]
            rows.append({name: json.loads(value) for name, value in names if not name.startswith("_")})
    return rows

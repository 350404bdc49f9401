"""Files of one JSON object a line. A kill can truncate the last line, and reading skips a truncated line."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plrd_train.runtime.files import replacing

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of `path` in order, without truncated lines; none where there is no such file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line in a single write. NaN and infinity, which JSON does not have, become null."""
    with path.open(
        "ab"
    ) as file:  # buffered: a raw write would not raise where the disk has room for a part of the line
        file.write(_line(row))


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the whole file atomically."""
    with replacing(path) as file:
        file.writelines(map(_line, rows))


def _line(row: Mapping[str, Any]) -> bytes:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False).encode() + b"\n"

"""Files of one JSON object a line that survive a kill: whole lines or a torn last one, which is left out when
reading."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plrd_train.runtime.files import replacing

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of `path`, in order; none where there is no such file. A torn line, as a kill leaves it, is
    skipped."""
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
    """Append one line, in a single write where there is room. JSON knows no NaN and no infinity: they become null."""
    with path.open("ab") as file:  # buffered: a plain write says nothing of a line for which the disk has room in part
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

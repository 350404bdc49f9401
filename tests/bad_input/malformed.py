"""What the tables of malformed inputs are made of: a way to spoil a sound folder, and what the one line that refuses it
must name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Spoil = Callable[[Path], object]


class Bad(NamedTuple):
    """`spoil` gets a copy of the sound folder. The line names every one of `named`."""

    spoil: Spoil
    named: tuple[str, ...]


def bad(spoil: Spoil, *named: str) -> Bad:
    return Bad(spoil, named)


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """What lies under `folder`: the bytes of files, the targets of links, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = str(path.readlink()) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    return found


def edited(name: str, change: Callable[[Any], Any]) -> Spoil:
    """The JSON file `name` with what `change` makes of its content (in place, where it returns None)."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        changed = change(content)
        (folder / name).write_text(json.dumps(content if changed is None else changed))

    return spoil


def with_key(name: str, *path: str | int, value: Any) -> Spoil:
    """The JSON file `name` with `value` at the `path` of keys."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return edited(name, change)


def without_key(name: str, *path: str | int) -> Spoil:
    """The JSON file `name` without what stands at the `path` of keys."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return edited(name, change)


def holding(name: str, content: bytes) -> Spoil:
    """The file `name` with this content."""
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, at: int) -> Spoil:
    """The file `name` cut off at this byte, counted from its end where negative."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:at])


def gone(*names: str) -> Spoil:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def folder_instead(name: str) -> Spoil:
    """A folder where the file `name` should be."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return spoil


def unreadable_json(name: str, *named: str) -> dict[str, Bad]:
    """Ways in which any JSON file may be no JSON at all, or one of another shape."""
    ways = {
        "empty": holding(name, b""),
        "truncated": cut(name, -9),
        "no JSON": holding(name, b"{'model': 1}"),
        "not UTF-8": holding(name, b'{"\xff\xfe": 1}'),
        "UTF-16": holding(name, '{"a": 1}'.encode("utf-16")),
        "NUL bytes": holding(name, bytes(64)),
        "nested without end": holding(name, b"[" * 200_000),
        "nested objects": holding(name, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "a list": holding(name, b"[]"),
        "a number": holding(name, b"3"),
        "null": holding(name, b"null"),
        "a string": holding(name, b'"model"'),
        "a folder": folder_instead(name),
    }
    return {f"{name}: {way}": Bad(spoil, named) for way, spoil in ways.items()}

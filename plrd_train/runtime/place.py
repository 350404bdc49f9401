"""The place of this process in a run, from the launcher's environment variables.

A launcher sets five variables. A shell in a Slurm allocation or in a container often has one or two of them, left over
from something else. A part of them is refused: with it the process would wait for a process group that nobody joins.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from plrd_train.errors import UserError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_LAST_PORT = 65_535


@dataclass(frozen=True)
class Place:
    """Which rank this process is, of how many, and where they meet. Without a launcher it is alone, and meets
    nobody."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the ranks of this node
    master: str | None = None  # the host on which rank 0 waits for the others
    port: int | None = None  # where it does so

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "Place":
        """The place that a launcher's variables describe.

        Raises UserError with one line that names those missing or wrong, and how to mend that.
        """
        names = (*_NUMBERS, *_MEETING)
        given = {name: environment[name] for name in names if name in environment}
        if not given:
            return cls()
        wrong = _no_numbers(given) or _missing(given) or _impossible(given)
        if wrong:
            mend = f"start with torchrun, or unset {' '.join(given)}"
            raise UserError(f"{'; '.join(wrong)}: a launcher sets {', '.join(names)}; {mend}")
        rank, size, local_rank = (int(given.get(name, 0)) for name in _NUMBERS)
        master, port = (given.get(name) for name in _MEETING)
        return cls(rank, size, local_rank, master, None if port is None else int(port))

    @property
    def launched(self) -> bool:
        """Whether a launcher has started this process."""
        return self.master is not None


def _no_numbers(given: Mapping[str, str]) -> list[str]:
    texts = [(name, text) for name, text in given.items() if name != "MASTER_ADDR"]
    wrong = [
        f"{name}={text!r} is no whole number from 0 on"
        for name, text in texts
        if not (text.isascii() and text.isdecimal())
    ]
    return wrong + (["MASTER_ADDR='' is no host"] if given.get("MASTER_ADDR") == "" else [])


def _missing(given: Mapping[str, str]) -> list[str]:
    """A world of one needs no place to meet, and no number within its node."""
    several = int(given.get("WORLD_SIZE", 1)) > 1
    meet = several or any(name in given for name in _MEETING)
    needed = ("RANK", "WORLD_SIZE", *(("LOCAL_RANK",) if several else ()), *(_MEETING if meet else ()))
    missing = [name for name in needed if name not in given]
    return (
        [f"{' '.join(f'{name}={value}' for name, value in given.items())} without {', '.join(missing)}"]
        if missing
        else []
    )


def _impossible(given: Mapping[str, str]) -> list[str]:
    size, port = int(given["WORLD_SIZE"]), int(given.get("MASTER_PORT", 1))
    if size < 1:
        return ["WORLD_SIZE=0 is no number of ranks"]
    numbers = {name: int(given.get(name, 0)) for name in ("RANK", "LOCAL_RANK")}
    wrong = [f"{name}={number} is not below WORLD_SIZE={size}" for name, number in numbers.items() if number >= size]
    return wrong + ([] if 1 <= port <= _LAST_PORT else [f"MASTER_PORT={port} is no port"])

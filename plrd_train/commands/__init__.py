"""The verbs of `plrd`. One file a verb, named as the verb; adding a file adds it to `plrd` and to its help.

All of these files are imported for `plrd --help`, so each imports at its top only what is quick; the rest is imported
by `run`.
"""

from __future__ import annotations

import argparse
from typing import Any, Protocol

from plrd_train.registry import Registry


class Command(Protocol):
    """What each file here defines, as members of the module."""

    HELP: str
    """One line for `plrd --help`, in small letters and without a full stop."""

    EXAMPLES: tuple[str, ...]
    """Whole command lines, for the end of `plrd --help`."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the verb's own options. `--json` is there already."""
        ...

    @staticmethod
    def run(given: argparse.Namespace) -> dict[str, Any]:
        """Do it, and return the JSON object of `--json`; print for people where `given.json` is false. Raises
        UserError."""
        ...


COMMANDS = Registry("command", "commands")

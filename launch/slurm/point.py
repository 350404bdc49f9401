"""`point.py INDEX COMMAND override…`: become COMMAND with the overrides of one point of the sweep that the overrides
describe, counted from 0."""

import os
import sys
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from plrd_train.config.overrides import readable
from plrd_train.config.sweep import points
from plrd_train.errors import UserError
from plrd_train.runtime.heartbeat import say


def point(index: int, arguments: Sequence[str]) -> list[str]:
    """The overrides of that point. Raises UserError where `points` does, and where there is no such point."""
    count = len(points(["--multirun", *arguments]))
    if index >= count:
        raise UserError(
            f"--array: there is no point {index}; the overrides describe {count}: submit with --array=0-{count - 1}"
        )
    parsed = OverridesParser.create().parse_overrides([readable(argument) for argument in arguments])
    ((*chosen,),) = BasicSweeper.split_arguments(parsed, None)
    return chosen[index]


def main() -> None:
    index, command, *arguments = sys.argv[1:]
    try:
        chosen = point(int(index), arguments)
    except UserError as error:
        say(str(error))
        sys.exit(2)
    os.execv(command, [command, *chosen])


if __name__ == "__main__":
    main()

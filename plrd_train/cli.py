"""The `plrd` command, also `python -m plrd_train.cli`: what one does with a finished family."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from plrd_train.commands import COMMANDS
from plrd_train.commands._arguments import Parser
from plrd_train.errors import UserError
from plrd_train.tracking import console

EPILOG = """examples:
{examples}

FAMILY is the run_dir of a run; MEMBER the folder of one of its members, or any model: a Hugging Face folder or hub id.
Families are made by `plrd factor`, without training, and by:
  torchrun --nproc_per_node N -m plrd_train experiment=NAME key=value …
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 2 after a user's mistake, which is printed as one line on standard
    error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        given = _parser(arguments).parse_args(arguments)
        console.set_main(True, to_stderr=given.json)
        result = given.run(given)
        if given.json:
            print(json.dumps(_finite(result), ensure_ascii=False, allow_nan=False))
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:  # as of `plrd show … | head`; Python would complain when it closes standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    return 0


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    names = COMMANDS.names()
    if arguments and arguments[0] in names:  # the files of all verbs are needed for help and mistakes alone
        names = [arguments[0]]
    verbs = {name: COMMANDS.get(name) for name in names}
    raw = argparse.RawDescriptionHelpFormatter
    examples = "\n".join(f"  {line}" for verb in verbs.values() for line in verb.EXAMPLES)
    parser = Parser(
        prog="plrd",
        description="What one does with a finished family of models.",
        epilog=EPILOG.format(examples=examples),
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"plrd {_version()}")
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, verb in verbs.items():
        sub = group.add_parser(name, help=verb.HELP, description=f"{verb.HELP[0].upper()}{verb.HELP[1:]}.")
        sub.set_defaults(run=verb.run)
        sub.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output, and nothing else there"
        )
        verb.add_arguments(sub)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("plrd-train")
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout that is not installed"


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""Command lines: a parser that raises UserError, the types of arguments, and the options that several verbs share."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from plrd_train.errors import UserError
from plrd_train.runtime.paths import expanded


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print the usage and exit. Options may stand anywhere among the other
    arguments."""

    _mixing = False

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._mixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False


def given_path(text: str) -> str:
    """A path, a glob or a hub id, with ~ expanded."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def given_folder(text: str) -> Path:
    """The path of a folder that may not exist yet."""
    return Path(given_path(text))


def whole(least: int) -> Callable[[str], int]:
    """The type of a whole number of at least `least`; 1e6 is read as one."""

    def parse(text: str) -> int:
        value = _float(text)
        if not value.is_integer() or value < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number of at least {least}")
        return int(value)

    return parse


def number(least: float = 0.0, above: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """The type of a finite number of at least `least`, above `above` and at most `most`."""

    def parse(text: str) -> float:
        value = _float(text)
        if not (math.isfinite(value) and value >= least and value > above and value <= most):
            bound = f"above {above:g}" if above >= least else f"of at least {least:g}"
            raise argparse.ArgumentTypeError(
                f"{text} is no number {bound}{f' and at most {most:g}' if most < math.inf else ''}"
            )
        return value

    return parse


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def add_family(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", metavar="FAMILY", type=given_folder, help="the run_dir of a family")


def add_remote_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the tokenizer's own code, where the model brings some"
    )

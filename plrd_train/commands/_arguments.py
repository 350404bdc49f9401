"""Command lines: a parser whose complaints are UserErrors, and the kinds of its arguments."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from plrd_train.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print below the usage. Options may stand anywhere among the other arguments."""

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


def expanded(path: str) -> str:
    """`path` with the home folder that a leading ~ or ~user stands for. Raises UserError where there is none."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = path.partition("/")[0]
        raise UserError(f"{path}: {user} is no home folder that is known here; write the path out")
    return found


def given_path(text: str) -> str:
    """A path, or whatever else may stand for one: a glob, a hub id."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def given_folder(text: str) -> Path:
    """The path of a folder, which need not be there."""
    return Path(given_path(text))


def whole(least: int) -> Callable[[str], int]:
    """A whole number of at least `least`; 1e6 is one."""

    def parse(text: str) -> int:
        value = _float(text)
        if not value.is_integer() or value < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number of at least {least}")
        return int(value)

    return parse


def number(least: float = 0.0, above: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """A finite number of at least `least`, above `above` and at most `most`."""

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

"""From Hydra overrides to resolved mappings. Beside this file only sweep.py and __main__.py know Hydra."""

import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from plrd_train.config.overrides import check, literal, readable
from plrd_train.errors import UserError
from plrd_train.registry import GROUP, packages
from plrd_train.runtime.paths import expanded

_PACKAGE = Path(__file__).resolve().parents[1]
# Beside the package in a checkout, inside it in a wheel.
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())


def conf_folders() -> list[Path]:
    """The folder of our own YAML files, and those of plug-ins (`plrd_train.registry`)."""
    return [CONF, *(root / "conf" for name, root in packages().items() if name != GROUP and (root / "conf").is_dir())]


# The keys that may hold a path.
PATHS = ("run_dir", "parent.path", "parent.scratch.tokenizer", "data.train", "data.validation", "engine.nvme_path")


class _NoOverridesError(UserError):
    """Hydra's argument parser has said on standard error what is wrong."""


def compose(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The resolved config of each job that `arguments` describe: one, or those of a sweep (`--multirun`); none where
    Hydra only had to print.

    Raises UserError with one line where Hydra or OmegaConf cannot compose them; what the keys mean is checked by
    `plrd_train.config.schema`.
    """
    jobs: list[Any] = []
    failures: list[Exception] = []

    def resolve(config: DictConfig) -> None:  # Hydra calls it while `${hydra:job.num}` can be resolved
        try:
            expand_paths(config)
            jobs.append(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
        except Exception as error:  # kept for later: Hydra would print it
            failures.append(error)

    first = next((i for i, argument in enumerate(arguments) if "=" in argument and argument[0] != "-"), len(arguments))
    with tempfile.TemporaryDirectory() as folder:  # for what Hydra records of a sweep
        printed = io.StringIO()
        try:
            with redirect_stderr(printed):
                call_hydra([*arguments[:first], f"hydra.sweep.dir={literal(folder)}", *arguments[first:]], resolve)
        except _NoOverridesError:
            wrong = printed.getvalue().strip().rpartition("error: ")[2]
            raise UserError(f"the arguments are no overrides of Hydra: {' '.join(wrong.split())}") from None
        sys.stderr.write(printed.getvalue())
    with _in_one_line():
        for failure in failures:
            raise failure
    return jobs


def expand_paths(config: DictConfig) -> None:
    """Expand a leading ~ in every key of PATHS, before other keys interpolate it.

    Raises UserError where there is no such home.
    """
    for key in PATHS:
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(config, key, _expanded(key, value))


def _expanded(key: str, value: str) -> str:
    try:
        return expanded(value)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def call_hydra(arguments: Sequence[str], task: Callable[[DictConfig], None]) -> None:
    """Let Hydra compose each job that `arguments` describe, and its launcher call `task` with it.

    Raises UserError as `compose` does, and what `task` raises.
    """
    _check_groups(arguments)
    flags = {"-m", "--multirun"}
    for argument in arguments:
        if "=" in argument and not argument.startswith("-"):
            check(argument, sweep=not flags.isdisjoint(arguments))
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    ordered = sorted(arguments, key=lambda argument: argument not in flags)  # Hydra takes no flag between two overrides
    given = [argument for argument in ordered if not argument.startswith("--local_rank")]
    sent = [_permissive(readable(argument)) for argument in given]
    plug_ins = ",".join(literal(f"file://{folder}") for folder in conf_folders()[1:])
    sys.argv = [sys.argv[0], *([f"hydra.searchpath=[{plug_ins}]"] if plug_ins else []), *sent]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of being printed
    try:
        with _in_one_line(dict(zip(sent, given, strict=True))):
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    finally:
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before[1]


@contextmanager
def _in_one_line(typed: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise inside the block into a UserError. `typed` maps each argument that Hydra was
    given to what the user typed."""
    try:
        yield
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: this key has no value yet; give {error.full_key}=…") from None
    # Hydra raises a ValueError for a group that is no name.
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        message = str(error).partition("Config search path")[0]
        lines = [line.strip() for line in message.splitlines() if line.strip() and "object_type" not in line]
        place = f"{' '.join(str(error.override).split())}: " if isinstance(error, OverrideParseException) else ""
        line = place + "; ".join(lines).replace(":; ", ": ").rstrip("; ")
        if line.startswith("Error merging override "):  # Hydra leaves out why
            why = str(error.__cause__).partition("\n")[0]
            line = f"{line.removeprefix('Error merging override ')}: {why}"
        for sent, argument in (typed or {}).items():
            line = line.replace(sent, argument)
        raise UserError(line) from None
    except SystemExit as end:  # Hydra's argument parser: it has printed help, or what is wrong
        if end.code:
            raise _NoOverridesError("the arguments are no overrides of Hydra") from None


def _check_groups(arguments: Sequence[str]) -> None:
    """Raise UserError where a group is given a value instead of a name, which Hydra reports badly."""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and not key:
            raise UserError(f"{argument}: names no key; give KEY=VALUE")
        if not equals or argument == "experiment=null":
            continue
        several = key == "evaluation" and re.fullmatch(r"\[[\w,]+\]", value)
        if (CONF / key).is_dir() and not several and re.fullmatch(r"[\d.]*|[\[{].*|null", value):
            names = ", ".join(sorted(path.stem for folder in conf_folders() for path in (folder / key).glob("*.yaml")))
            raise UserError(f"{argument}: a group override must be a string, the name of one of its files: {names}")


def _permissive(argument: str) -> str:
    """`key=value` as `++key=value`, which Hydra takes whether the key exists or not: unknown keys are named by our own
    schema, in one line."""
    key, equals, _ = argument.partition("=")
    if not equals or argument[0] in "+~-" or key.startswith("hydra") or (CONF / key).is_dir():
        return argument
    return f"++{argument}"

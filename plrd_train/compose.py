"""From Hydra overrides to resolved mappings: the only place, with __main__ and cli, that knows Hydra."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from plrd_train.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
# Beside the package in a checkout, inside it in a wheel.
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())


def compose(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The resolved config of each job that `arguments` describe: one, or those of a sweep (`--multirun`); none where Hydra only had to print.

    Raises UserError with one line where Hydra or OmegaConf cannot compose them; what the keys mean is checked by `plrd_train.config`.
    """
    composed: list[DictConfig] = []
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [sys.argv[0], *(_permissive(argument) for argument in arguments if not argument.startswith("--local_rank"))]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of being printed
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(composed.append)()
        return [OmegaConf.to_container(config, resolve=True, throw_on_missing=True) for config in composed]  # type: ignore[misc]
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: this key has no value yet; give {error.full_key}=…") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises the latter for a group that is no name
        message = str(error).partition("Config search path")[0]
        lines = [line.strip() for line in message.splitlines() if line.strip() and "object_type" not in line]
        raise UserError("; ".join(lines).replace(":; ", ": ").rstrip("; ")) from None
    except SystemExit as end:  # Hydra's argument parser: it has printed help, or what is wrong
        if end.code:
            raise UserError("the arguments are no Hydra overrides; see the line above") from None
        return []
    finally:
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before[1]


def _permissive(argument: str) -> str:
    """`key=value` as `++key=value`, which Hydra takes whether the key exists or not: unknown keys are named by our own schema, in one line."""
    key, equals, _ = argument.partition("=")
    if not equals or argument[0] in "+~-" or (CONF / key).is_dir():
        return argument
    return f"++{argument}"

"""What a stage minimises. One file an objective, named as `objective=NAME`; adding a file (and its YAML in conf/objective/) adds the objective."""

import importlib
import pkgutil
from typing import Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """What each file here defines, as a frozen dataclass named `Objective` whose fields are its own settings."""

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """The loss of a batch of packed sequences `input_ids` (n, seq_len), summed over its n * (seq_len - 1) predicted tokens; a float32 scalar."""
        ...


def available() -> list[str]:
    """The names of all objectives."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> type[Objective]:
    """The objective of that name; raises KeyError for an unknown one."""
    if name not in available():
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}").Objective

"""How a weight becomes two factors. One file a method, named as the method; adding a file (and its YAML in conf/factorizer/) adds the method."""

import importlib
import pkgutil
from typing import Protocol

from torch import Tensor

from plrd_train.lowrank.truncate import Factors


class Factorizer(Protocol):
    """What each file here defines, as a frozen dataclass named `Factorizer` whose fields are the method's own settings."""

    def dense(self, weight: Tensor, rank: int) -> Factors:
        """Factor a dense `weight` (out, in) to `rank`."""
        ...

    def product(self, up: Tensor, down: Tensor, rank: int) -> Factors:
        """Lower the rank of a pair that is low-rank already, `up` (out, k) and `down` (k, in), to `rank` < k."""
        ...


def available() -> list[str]:
    """The names of all methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> type[Factorizer]:
    """The method of that name; raises KeyError for an unknown one."""
    if name not in available():
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}").Factorizer

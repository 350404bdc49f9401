"""How a weight becomes two factors. One file a method, named as the method; adding a file (and its YAML in conf/factorizer/) adds the method."""

import importlib
import pkgutil
from typing import ClassVar, Protocol

from torch import Tensor

from plrd_train.lowrank.ranks import Shape
from plrd_train.lowrank.spectral import Spectral

# What calibration text tells of one Linear, by `plrd_train.lowrank.calibration`: "inputs" is the second moment of its input, (in, in); "magnitudes"
# the mean magnitude of each input channel and "gradients" the Fisher information of each, (in,).
Statistic = Tensor


class Factorizer(Protocol):
    """What each file here defines, as a frozen dataclass named `Factorizer` whose fields are the method's own settings."""

    sequential: ClassVar[bool]
    """Whether a Linear is factored on the inputs that the Linears before it give once they are factored: such a method has a driver of its own."""

    statistics: ClassVar[str | None]
    """What it needs to know of each Linear: the name of a Statistic, or None. A method that needs one has a setting `calibration_tokens`."""

    def dense(self, weight: Tensor, statistic: Statistic | None) -> Spectral:
        """Decompose a dense `weight` (out, in)."""
        ...

    def product(self, up: Tensor, down: Tensor, statistic: Statistic | None) -> Spectral:
        """Decompose a pair that is low-rank already, `up` (out, k) and `down` (k, in)."""
        ...

    def peak_bytes(self, shape: Shape) -> int:
        """What decomposing one Linear of that shape and cutting it takes beyond the gathered float32 weight, in bytes."""
        ...


def available() -> list[str]:
    """The names of all methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> type[Factorizer]:
    """The method of that name; raises KeyError for an unknown one."""
    if name not in available():
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}").Factorizer

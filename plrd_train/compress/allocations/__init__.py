"""How a budget of parameters is shared out as ranks. One file an allocation, named as the allocation; adding a file
(and its YAML in conf/ranks/) adds it."""

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from plrd_train.compress.ranks import Shape
from plrd_train.registry import Registry


class Allocation(Protocol):
    """What each file here defines, as a frozen dataclass named `Allocation` whose fields are its settings."""

    spectra: ClassVar[bool]
    """Whether it needs the singular values of all Linears, which are decomposed first then."""

    losses: ClassVar[bool]
    """Whether it needs measured losses. Then it needs spectra too, and is a `Measuring`."""

    @property
    def multiple(self) -> int:
        """Ranks are multiples of it."""
        ...

    def ranks(
        self, shapes: Mapping[str, Shape], ratio: float, values: Mapping[str, Tensor], losses: Mapping[str, float]
    ) -> dict[str, int]:
        """The rank of each Linear that is low-rank at that `ratio`; a Linear that is not named stays dense.

        `values` are the singular values (k,) of each Linear (`Spectral.values`), empty without `spectra`. `losses` say
        how much the mean nll grew with that Linear alone cut at its `probe`, and are empty without `losses`.
        """
        ...


class Measuring(Allocation, Protocol):
    """An allocation by losses that are measured (`plrd_train.compress.losses`)."""

    @property
    def tokens(self) -> int:
        """Tokens of calibration text on which the loss is measured, once for each Linear."""
        ...

    def probe(self, shape: Shape) -> int:
        """The rank at which a Linear of that shape is measured."""
        ...


ALLOCATIONS = Registry("allocation", "compress.allocations", settings="Allocation")

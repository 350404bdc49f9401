"""What replaces a Linear. One file a form, named as the form; adding a file (and its YAML in conf/form/) adds it.

Whatever the form, a model is trained as pairs of factors, up (out, rank) and down (rank, in), and goes from stage to
stage as such. A form says what a rank costs, and how a pair is stored when it is published.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, Protocol

from torch import Tensor, nn

from plrd_train.registry import Registry

# The parameters of a pair of factors; up.bias is the bias of the Linear, where it has one.
PARTS = ("down.weight", "up.weight", "up.bias")


class Form(Protocol):
    """What each file here defines, as functions of the module, and the class `Linear`."""

    Linear: type[nn.Module]
    """The module of a published model: Linear(in_features, out_features, rank, bias). Members hold a copy of its file,
    which therefore imports torch and linear.py alone."""

    PACKS: bool
    """Whether `pack` changes the factors."""

    @staticmethod
    def params(out_features: int, in_features: int, rank: int) -> int:
        """Parameters at that rank, as the ratio of a model counts them."""
        ...

    @staticmethod
    def most_rank(out_features: int, in_features: int, params: float) -> int:
        """The largest rank that takes at most `params` parameters; 0: none."""
        ...

    @staticmethod
    def pack(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the same product in the shape in which the form can store them, both float32. Raises
        ValueError where there are none."""
        ...

    @staticmethod
    def pack_bytes(out_features: int, in_features: int, rank: int) -> int:
        """The most bytes that packing a pair takes beside the pair."""
        ...

    @staticmethod
    def stored(part: str, tensor: Tensor) -> dict[str, Tensor]:
        """The entries in the state of `Linear` that store `tensor`, which is the `part` (up.weight, down.weight or
        up.bias) of a packed pair."""
        ...

    @staticmethod
    def loaded(part: str, state: Callable[[str], Tensor]) -> Tensor:
        """That part of a packed pair, from the entries of the state of `Linear`."""
        ...


def split(name: str, linears: Collection[str]) -> tuple[str, str] | None:
    """(Linear, part) where `name` is that of a parameter of the pair of one of `linears`; else None."""
    for part in PARTS:
        linear = name.removesuffix(f".{part}")
        if linear != name and linear in linears:
            return linear, part
    return None


FORMS = Registry("form", "compress.forms", settings="Settings")


@functools.cache
def get(name: str) -> Any:
    """The form of that name. Raises KeyError for an unknown one."""
    return FORMS.get(name)


def linear_of(name: str) -> Any:
    """The class `Linear` of the form of that name; raises KeyError for an unknown one."""
    return get(name).Linear

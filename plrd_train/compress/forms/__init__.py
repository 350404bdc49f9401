"""What stands in a Linear's place. One file a form, named as the form; adding a file (and its YAML in conf/form/) adds
it.

A model is trained as pairs of factors, up (out, rank) and down (rank, in), whatever the form, and the trunk goes from
stage to stage so. A form says what a rank costs, and what a pair becomes when it is published.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, Protocol

from torch import Tensor, nn

from plrd_train.registry import Registry

# What a pair of factors is made of; the bias is that of the Linear, where it has one.
PARTS = ("down.weight", "up.weight", "up.bias")


class Form(Protocol):
    """What each file here defines, as functions of the module, and the class `Linear`."""

    Linear: type[nn.Module]
    """The module of a published model: Linear(in_features, out_features, rank, bias). Its file imports torch and
    neighbours of this package alone, since it travels inside members."""

    PACKS: bool
    """Whether `pack` changes a pair."""

    @staticmethod
    def params(out_features: int, in_features: int, rank: int) -> int:
        """Parameters at that rank, as a ratio counts them."""
        ...

    @staticmethod
    def most_rank(out_features: int, in_features: int, params: float) -> int:
        """The largest rank that takes at most `params` parameters; 0: none."""
        ...

    @staticmethod
    def pack(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The pair of the same product that the form can store as it is, both float32."""
        ...

    @staticmethod
    def pack_bytes(out_features: int, in_features: int, rank: int) -> int:
        """What packing a pair takes beyond the pair."""
        ...

    @staticmethod
    def stored(part: str, tensor: Tensor) -> dict[str, Tensor]:
        """What `tensor`, the `part` (up.weight, down.weight or up.bias) of a packed pair, is in the state of
        `Linear`."""
        ...

    @staticmethod
    def loaded(part: str, state: Callable[[str], Tensor]) -> Tensor:
        """That part of a packed pair again, from the `state` of `Linear` by name."""
        ...


def split(name: str, linears: Collection[str]) -> tuple[str, str] | None:
    """(Linear, part) of the name of a parameter that is a part of the pair of one of `linears`; None: it is none."""
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

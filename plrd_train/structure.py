"""What engines and optimizers see of a model: its parameters by shape, module and block."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from plrd_train.compress.blocks import blocks_of

Parts = dict[str, float]  # bytes by part of memory, such as "parameters"


@dataclass(frozen=True)
class Parameter:
    """A parameter. `module` owns it; `block` is the repeated block around the module.

    `block` is "" outside the blocks (embeddings, last norm, lm_head).
    """

    name: str
    shape: tuple[int, ...]
    module: str
    block: str

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Structure:
    """The parameters of a model (tied ones once), and {module name: its own parameters} for all modules."""

    parameters: tuple[Parameter, ...]
    modules: dict[str, tuple[Parameter, ...]]

    @classmethod
    def of(cls, model: nn.Module) -> "Structure":
        parameters = parameters_of(model)
        by_name = {parameter.name: parameter for parameter in parameters}
        by_identity = {id(parameter): by_name[name] for name, parameter in model.named_parameters()}
        modules = {
            name: tuple(by_identity[id(p)] for p in module._parameters.values() if p is not None)
            for name, module in model.named_modules()
        }
        return cls(parameters, modules)

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)


def parameters_of(
    model: nn.Module, shape: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape
) -> tuple[Parameter, ...]:
    """The parameters of `model`, tied ones once; `shape` says that of one, where an engine has replaced it."""
    blocks = list(blocks_of(model))
    return tuple(
        Parameter(
            name,
            tuple(shape(parameter)),
            name.rpartition(".")[0],
            next((block for block in blocks if name.startswith(f"{block}.")), ""),
        )
        for name, parameter in model.named_parameters()
    )


def add(*parts: Mapping[str, float]) -> Parts:
    """The sum, part by part."""
    return {
        name: sum(part.get(name, 0.0) for part in parts)
        for name in dict.fromkeys(name for part in parts for name in part)
    }


def total(parts: Mapping[str, float]) -> float:
    return sum(parts.values())


def largest(*candidates: Parts) -> Parts:
    """The candidate with the largest total."""
    return max(candidates, key=total)

"""Building the model of a config without its weights, and what weights do not bring: the buffers."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from plrd_train.compress.blocks import blocks_of
from plrd_train.compress.contracts import DecompositionError
from plrd_train.errors import UserError
from plrd_train.parents.modeling_plrd import model_ranks, with_ranks
from plrd_train.parents.probe import Probe, probe


def build_model(
    config: PreTrainedConfig, ranks: Mapping[str, int] | None = None, attention: str | None = None
) -> PreTrainedModel:
    """The causal LM of `config` in float32 on the default device, usually under `torch.device("meta")`; its weights are
    not set.

    `ranks` {module name: rank} says which Linears are pairs of factors, all others being dense; None: those of the
    config (of a member), which are pairs here whatever their published form. `attention` is one of transformers'
    implementations; None: its own choice. Raises ValueError where `ranks` names something that is no Linear or the
    architecture has no such attention, ImportError where that is not installed.
    """
    config = with_ranks(config, model_ranks(config) if ranks is None else ranks)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )


def published_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The class and structure that `AutoModelForCausalLM` loads a folder of this `config` as, otherwise as
    `build_model`."""
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)


_PROBED: dict[str, Probe] = {}


def probed(config: PreTrainedConfig) -> Probe:
    """What a forward of the causal LM of `config` shows (`plrd_train.parents.probe`), found once in a process."""
    key = f"{type(config).__qualname__} {config.to_json_string()}"
    if key not in _PROBED:
        with torch.device("meta"):
            model = build_model(config)
        _PROBED[key] = probe(model, blocks_of(model))
    return _PROBED[key]


def described(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of `parent.scratch.architecture`, which with its vocabulary is `values`. Raises UserError where no
    model can be made of it."""
    try:
        config = AutoConfig.for_model(**values)
        with torch.device("meta"):
            build_model(config)
    except Exception as error:  # transformers has no common class for what a wrong config raises
        raise UserError(
            f"parent.scratch.architecture: no model can be made of it ({' '.join(str(error).split())})"
        ) from None
    return config


def check_attention(config: PreTrainedConfig, attention: str | None) -> None:
    """Raise UserError where the architecture, the machine or what is installed has no such attention."""
    try:
        with torch.device("meta"):
            build_model(config, attention=attention)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"parent.attention: {attention} cannot be used here ({str(error).splitlines()[0]}); choose sdpa"
        ) from None


@torch.no_grad()
def refill_buffers(model: PreTrainedModel) -> None:
    """Recompute the non-persistent buffers (rotary frequencies, embedding scales), which hold garbage after `to_empty`,
    as transformers does.

    Parameters and persistent buffers are not touched, whatever they are (DTensors, partitioned, on meta). Raises
    RuntimeError naming a buffer that the architecture does not recompute.
    """
    outcomes = []
    for filler in (0, 1):  # a buffer is recomputed if and only if what it held before does not matter
        for _, buffer in model.named_non_persistent_buffers():
            buffer.fill_(filler)
        for module, owner in _buffer_owners(model, model):
            owner._init_weights(_without_parameters(module))
        outcomes.append({name: buffer.clone() for name, buffer in model.named_non_persistent_buffers()})
    for name, value in outcomes[0].items():
        if not torch.equal(value, outcomes[1][name]):
            raise RuntimeError(
                f"{type(model).__name__} does not recompute its buffer {name}, so it cannot be built on the meta device"
            )


def _buffer_owners(module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """Each module with non-persistent buffers of its own, and the innermost PreTrainedModel around it, whose
    initialisation applies."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    if module._non_persistent_buffers_set:
        yield module, owner
    for child in module.children():
        yield from _buffer_owners(child, owner)


def _without_parameters(module: nn.Module) -> nn.Module:
    """A stand-in that shares the module's attributes and non-persistent buffers, all else being on meta: initialising
    it cannot harm the module."""
    twin = object.__new__(type(module))  # not type(module)(): FSDP2 gives its classes another constructor
    twin.__dict__.update(module.__dict__)
    on_meta = {
        name: p if p is None else nn.Parameter(torch.empty(p.shape, device="meta"))
        for name, p in module._parameters.items()
    }
    own = module._non_persistent_buffers_set
    twin._parameters = on_meta
    twin._buffers = {
        name: b if b is None or name in own else torch.empty_like(b, device="meta")
        for name, b in module._buffers.items()
    }
    twin._modules = {}
    return twin


@dataclass(frozen=True)
class HubArchitecture:
    """The causal LM of `config` with the Linears of `ranks` low-rank, and that `attention` (see `build_model`): what
    `plrd_train.engine.Architecture` and `plrd_train.compress.contracts.Architecture` ask for."""

    config: PreTrainedConfig
    ranks: Mapping[str, int] | None = None
    attention: str | None = None

    def build(self) -> PreTrainedModel:
        return build_model(self.config, self.ranks, self.attention)

    def refill(self, model: nn.Module) -> None:
        refill_buffers(cast(PreTrainedModel, model))

    def outputs(self) -> Mapping[str, int]:
        """As `plrd_train.compress.contracts.Architecture` asks for it."""
        found = probed(self.config)
        if found.unchained is not None:
            raise DecompositionError(f"its blocks cannot be taken one after the other: {found.unchained}")
        return found.outputs

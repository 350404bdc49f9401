"""Build the model of a config without its weights, and recompute the buffers that no file stores."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from plrd_train.compress.blocks import blocks_of
from plrd_train.compress.contracts import DecompositionError
from plrd_train.errors import UserError
from plrd_train.parents.messages import first_line
from plrd_train.parents.modeling_plrd import model_ranks, with_ranks
from plrd_train.parents.probe import Probe, probe


def build_model(
    config: PreTrainedConfig, ranks: Mapping[str, int] | None = None, attention: str | None = None
) -> PreTrainedModel:
    """Build the causal LM of `config` in float32 on the default device, without setting its weights.

    Most callers build under `torch.device("meta")`. `ranks` {module name: rank} names the low-rank Linears; each is a
    pair of factors, and all other Linears are dense. With None, the ranks are those of the config (of a member), whose
    Linears also become pairs of factors, whatever form they were published in. `attention` is an attention
    implementation of transformers; None leaves the choice to transformers.

    Raises ValueError if `ranks` names a module that is not a Linear, or if the architecture lacks this attention;
    ImportError if the attention's package is not installed.
    """
    config = with_ranks(config, model_ranks(config) if ranks is None else ranks)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )


def published_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model with the class and structure that `AutoModelForCausalLM` loads for this `config`.

    Device, dtype and weights are as in `build_model`.
    """
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)


_PROBES: dict[str, Probe] = {}


def probe_of(config: PreTrainedConfig) -> Probe:
    """The probe of the causal LM of `config` (`plrd_train.parents.probe`), cached for the life of the process."""
    key = f"{type(config).__qualname__} {config.to_json_string()}"
    if key not in _PROBES:
        with torch.device("meta"):
            model = build_model(config)
        _PROBES[key] = probe(model, blocks_of(model))
    return _PROBES[key]


@contextmanager
def _building_on_meta(source: str, fix: str) -> Iterator[None]:
    """Build models on the meta device. Any error becomes a UserError: `source` is where the config came from."""
    try:
        with torch.device("meta"):
            yield
    except Exception as error:  # transformers has no common class for the errors of a wrong config
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: no model can be built from it ({type(error).__name__}: {reason}); {fix}") from error


def check_architecture(config: PreTrainedConfig, file: Path) -> PreTrainedModel:
    """The model of `config`, which was read from `file`, on the meta device.

    Raises UserError if transformers cannot build it.
    """
    with _building_on_meta(str(file), "fetch it again"):
        return published_model(config)


def scratch_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a parent that is trained from scratch: `parent.scratch.architecture` and its vocabulary size.

    Raises UserError if transformers cannot build a model from `values`.
    """
    with _building_on_meta("parent.scratch.architecture", "correct these values"):
        config = AutoConfig.for_model(**values)
        published_model(config)
    return config


def check_attention(config: PreTrainedConfig, attention: str | None) -> None:
    """Raise UserError if this attention is unavailable: to the architecture, on this machine, or not installed."""
    try:
        with torch.device("meta"):
            build_model(config, attention=attention)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"parent.attention: {attention} cannot be used here ({first_line(error)}); choose sdpa"
        ) from None


@torch.no_grad()
def refill_buffers(model: PreTrainedModel) -> None:
    """Recompute the non-persistent buffers (rotary frequencies, embedding scales), as transformers initialises them.

    After `to_empty` these buffers are uninitialised memory. Parameters and persistent buffers stay untouched, also as
    DTensors, partitioned, or on meta. Raises RuntimeError with the name of a buffer that the architecture does not
    recompute.
    """
    outcomes = []
    for filler in (0, 1):  # a recomputed buffer has the same values whatever it held before
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
    """Yield each module that owns non-persistent buffers, with the innermost PreTrainedModel around it.

    That PreTrainedModel initialises the module.
    """
    owner = module if isinstance(module, PreTrainedModel) else owner
    if module._non_persistent_buffers_set:
        yield module, owner
    for child in module.children():
        yield from _buffer_owners(child, owner)


def _without_parameters(module: nn.Module) -> nn.Module:
    """A copy of the module that shares its attributes and non-persistent buffers; all other tensors are on meta.

    Initialising the copy therefore changes nothing but those buffers.
    """
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
    """The causal LM of `config`; `ranks` and `attention` are those of `build_model`.

    Implements `plrd_train.compress.contracts.BlockArchitecture`.
    """

    config: PreTrainedConfig
    ranks: Mapping[str, int] | None = None
    attention: str | None = None

    def build(self) -> PreTrainedModel:
        return build_model(self.config, self.ranks, self.attention)

    def refill(self, model: nn.Module) -> None:
        refill_buffers(cast(PreTrainedModel, model))

    def outputs(self) -> Mapping[str, int]:
        """See `plrd_train.compress.contracts.BlockArchitecture`."""
        found = probe_of(self.config)
        if found.unchained is not None:
            raise DecompositionError(f"its blocks cannot be run one after the other: {found.unchained}")
        return found.outputs

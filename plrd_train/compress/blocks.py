"""A walk through a causal LM: one block in memory at a time, with the inputs that it receives on calibration text.

Sequential methods walk so, over the ranks of an engine as well as on one CPU that reads a checkpoint. Each rank holds
the whole block, and its own part of the text.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plrd_train.compress.contracts import Block, BlockArchitecture, Call, Shards
from plrd_train.compress.rounds import everywhere

# (name, shape) -> the whole float32 parameter, the same on every rank.
Read = Callable[[str, torch.Size], Tensor]


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model, by name, in order: the modules of the ModuleList that holds the most
    parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    largest = max(
        lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()), default=None
    )
    return {} if largest is None else {f"{largest}.{i}": block for i, block in enumerate(lists[largest])}


@torch.no_grad()
def walk(
    architecture: BlockArchitecture, read: Read, batches: Sequence[Tensor], device: torch.device
) -> Iterator[Block]:
    """Yield the blocks in order. Later blocks receive the outputs of the block as the caller modified it.

    `batches` are those of this rank, each (n, length) token ids; a rank may have none. The embeddings are in memory at
    first, then one block, and always the hidden states of all batches, in float32. A collective where `read` is one.
    """
    with torch.device("meta"):
        model = architecture.build()
    model.eval().requires_grad_(False)
    for module in model.modules():
        module._buffers.update(
            {name: b if b is None else torch.empty_like(b, device=device) for name, b in module._buffers.items()}
        )
    architecture.refill(model)
    blocks = blocks_of(model)
    hidden, calls = _first_inputs(model, blocks, architecture.outputs(), read, batches, device)
    for name, module in blocks.items():
        _fill(_parameters(module, name), read, device)
        block = Block(name, module, hidden, calls.pop(0))
        yield block
        block.outputs()
        module.to_empty(device="meta")


def gathered(engine: Shards) -> Read:
    """A `Read` of the parameters in an engine; it is a collective."""

    def read(name: str, shape: torch.Size) -> Tensor:
        return everywhere(engine, engine.gather(name, 0)(), shape, owner=0)

    return read


@dataclass
class Alone:
    """`Shards` of one process without an engine: a parameter is read when it is needed, and a shard is the whole."""

    read: Callable[[str], Tensor]  # of any floating dtype
    device: torch.device
    rank: int = 0
    world_size: int = 1

    def gather(self, name: str, owner: int) -> Callable[[], Tensor | None]:
        return lambda: self.read(name).to(self.device, torch.float32)

    def scatter(self, tensor: Tensor | None, shape: tuple[int, ...], owner: int) -> Tensor:
        assert tensor is not None
        return tensor

    def share(self, value: object) -> list[Any]:
        return [value]


def _parameters(
    module: nn.Module, prefix: str, leave: Collection[nn.Module] = ()
) -> Iterator[tuple[nn.Module, str, nn.Parameter, str]]:
    """(module, name of the parameter in it, the parameter, its name in the model) of each parameter of `module`,
    without those of the modules in `leave`. `prefix` is the name of `module` in the model."""
    left = {inside for other in leave for inside in other.modules()}
    for path, inside in module.named_modules(prefix=prefix):
        for name, parameter in list(inside._parameters.items()) if inside not in left else ():
            if parameter is not None:
                yield inside, name, parameter, f"{path}.{name}" if path else name


def _fill(parameters: Iterator[tuple[nn.Module, str, nn.Parameter, str]], read: Read, device: torch.device) -> None:
    for inside, name, parameter, path in parameters:
        inside._parameters[name] = nn.Parameter(read(path, parameter.shape).to(device), requires_grad=False)


def _first_inputs(
    model: Any,
    blocks: Mapping[str, nn.Module],
    outputs: Mapping[str, int],
    read: Read,
    batches: Sequence[Tensor],
    device: torch.device,
) -> tuple[list[Tensor], list[list[Call]]]:
    """The hidden states that the first block receives for each batch, and the calls of each block. The model runs once
    with blocks that record their arguments and return their hidden states, in a tuple of the length in `outputs`, as
    the model around them expects."""
    backbone = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    _fill(_parameters(backbone, prefix, leave=blocks.values()), read, device)
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in blocks]

    def record(block: int, elements: int) -> Callable[..., Any]:
        def forward(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if block == 0:
                hidden.append(states)
            calls[block].append((args, kwargs))
            return (states, *[None] * (elements - 1)) if elements else states

        return forward

    for block, (name, module) in enumerate(blocks.items()):
        module.forward = record(block, outputs[name])
    for batch in batches:
        backbone(input_ids=batch.to(device), use_cache=False)
    for module in blocks.values():
        del module.forward  # uncovers the forward of its class
    for inside, name, parameter, _ in _parameters(backbone, prefix, leave=blocks.values()):
        inside._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return hidden, calls

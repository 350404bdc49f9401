"""Trace the memory of a model's forward and backward on the meta device, which has shapes but no values.

Every operation is counted when PyTorch dispatches it. The count therefore includes tensors kept by autograd,
recomputation by activation checkpointing, and the loss's copies of the logits. Only fused attention is replaced, since
its kernels do not run on meta. It is assumed to keep query, key, value, output and one float32 per head and position
(FlashAttention, arXiv 2307.08691), and no tensor of quadratic size.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

Kind = Literal["forward", "forwarded", "backward", "backwarded", "gradient", "end"]


@dataclass(frozen=True)
class Event:
    """An event that engines act on: a module begins or ends its forward or backward, or a gradient is complete.

    name: of the module ("" is the model itself) or parameter. peak: the peak bytes of activations since the previous
    event. live: the bytes of activations now. Neither counts parameters or complete gradients of parameters.
    """

    kind: Kind
    name: str
    peak: int
    live: int


def trace_step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[Event]:
    """The events of the forward and backward of `loss(model)`.

    `model` is on the meta device. Its gradients are dropped.
    """
    with _Recorder(model) as recorder:
        value = loss(model)
        value.backward()
        del value
        recorder.note("backwarded", "")
    return recorder.events


@torch.no_grad()
def trace_evaluation(model: nn.Module, compute: Callable[[nn.Module], object]) -> list[Event]:
    """The events of `compute(model)` without gradients. `model` is on the meta device."""
    with _Recorder(model) as recorder:
        compute(model)
        recorder.note("end", "")
    return recorder.events


class _Recorder:
    """A context manager that hooks a model and counts the memory of its activations."""

    def __init__(self, model: nn.Module):
        self.events: list[Event] = []
        self._model, self._memory = model, _Memory(model)

    def note(self, kind: Kind, name: str) -> None:
        self.events.append(Event(kind, name, self._memory.peak, self._memory.live))
        self._memory.peak = self._memory.live

    def __enter__(self) -> "_Recorder":
        self._attention = getattr(self._model.config, "_attn_implementation", None)
        if self._attention == "sdpa":
            self._model.set_attn_implementation(_FUSED)  # type: ignore[operator]  # a method of transformers' models
        self._hooks = [hook for name, module in self._model.named_modules() for hook in self._watch(name, module)]
        for name, parameter in self._model.named_parameters():
            self._hooks.append(
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._accumulated(name, p))
            )  # type: ignore[misc]
        self._memory.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._memory.__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        if self._attention == "sdpa":
            self._model.set_attn_implementation("sdpa")  # type: ignore[operator]

    def _watch(self, name: str, module: nn.Module) -> Iterator[Any]:
        def begin(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            self.note("forward", name)
            if not name or not torch.is_grad_enabled():
                return args, kwargs

            def mark(value: Any) -> Any:
                return _Mark.apply(self, name, value) if isinstance(value, Tensor) and value.requires_grad else value

            return tree_map(mark, args), tree_map(mark, kwargs)

        def end(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            begun = False

            def on_gradient(gradient: Tensor) -> None:
                nonlocal begun
                if not begun:
                    self.note("backward", name)
                begun = True

            for value in tree_leaves(output):
                if isinstance(value, Tensor) and value.requires_grad:
                    value.register_hook(on_gradient)
            self.note("forwarded", name)

        yield module.register_forward_pre_hook(begin, with_kwargs=True)
        yield module.register_forward_hook(end, with_kwargs=True)

    def _accumulated(self, name: str, parameter: Tensor) -> None:
        parameter.grad = None  # from here on the engine's memory model counts it
        self.note("gradient", name)


class _Mark(torch.autograd.Function):
    """The identity on an input of a module. Its backward marks the end of the module's backward.

    The gradient of the input is the last one that a module computes.
    """

    @staticmethod
    def forward(ctx: Any, recorder: _Recorder, name: str, value: Tensor) -> Tensor:
        ctx.recorder, ctx.name = recorder, name
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        ctx.recorder.note("backwarded", ctx.name)
        return None, None, gradients[0]


class _Memory(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate, until they are freed.

    The storages of `model`'s parameters and buffers do not count.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # transformers asks whether all positions follow one another, and they do
        output = func(*args, **(kwargs or {}))
        for tensor in (output,) if isinstance(output, Tensor) else tree_leaves(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return output

    def _freed(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.live -= size


_FUSED = "fused_on_meta"


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, length, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple:
    """The memory of transformers' `sdpa`. With a mask, keys and values are repeated for each query head."""
    if attention_mask is not None and (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None  # type: ignore[no-untyped-call]


AttentionInterface.register(_FUSED, _fused_attention)
AttentionMaskInterface.register(_FUSED, sdpa_mask)


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Give the parameters of `model`, which is on the meta device, the `dtype` that engines compute in."""
    before = {parameter: parameter.data for parameter in model.parameters()}
    for parameter, data in before.items():
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data

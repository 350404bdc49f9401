"""Inspect an architecture by one forward on the meta device, where tensors have shapes but no values."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from plrd_train.compress.linear import LowRankLinear
from plrd_train.parents.reads import read_in_source

_TOKENS = 8
# A position table may have this many rows more than the longest sequence: OPT's has 2.
_MORE_ROWS = 2


@dataclass(frozen=True)
class Probe:
    """Facts about an architecture, found by one forward.

    fixed: the Linears that cannot be replaced, because code other than nn.Linear's forward reads their weight or bias.
    outputs: {block name: length of the tuple that the block returns, 0 for a tensor}, in the order of the calls.
    unchained: why the blocks cannot be run one by one, each on the hidden states of the block before; None if they can.
    positions: the longest sequence, in tokens, that the position table covers; None without such a table.
    """

    fixed: frozenset[str]
    outputs: Mapping[str, int] = field(default_factory=dict)
    unchained: str | None = None
    positions: int | None = None


@torch.no_grad()
def probe(model: PreTrainedModel, blocks: Mapping[str, nn.Module]) -> Probe:
    """Run `model`, which is on the meta device, on a few tokens. `blocks` is {name: block}.

    The model cannot be used afterwards: its Linears and blocks carry hooks. For an architecture whose forward needs
    values, `fixed` comes from its source code alone, and `unchained` says so.
    """
    pairs = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LowRankLinear))
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(pairs)  # the factors of a member
    }
    fixed = {name for name, linear in linears.items() if not _is_linear(linear)} | set(read_in_source(model, linears))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, linear in linears.items():
        _watch(linear, functools.partial(fixed.add, name))
    chain = _Chain(blocks)
    values = _Values(model, chain)
    try:
        with _experts_by_shape(model), torch.device("meta"), values:
            cast(Any, model.eval())(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long), use_cache=False)
    except Exception as error:  # an architecture may raise any error without values
        why = f"it cannot be run without values: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        return Probe(frozenset(fixed), unchained=why)
    has_table = isinstance(limit, int) and any(limit <= rows <= limit + _MORE_ROWS for rows in values.rows)
    return Probe(frozenset(fixed), chain.outputs, chain.broken, limit if has_table else None)


# Linears


@functools.cache
def _computes_as_linear(kind: Any) -> bool:
    """Whether a subclass with its own forward computes what nn.Linear does (Falcon's does, a router does not)."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((5, 4), (5,), (3, 4)))
    twin: Any = object.__new__(kind)
    nn.Module.__init__(twin)
    twin.weight, twin.bias, twin.in_features, twin.out_features = nn.Parameter(weight), nn.Parameter(bias), 4, 5
    try:
        output = twin(x)
    except Exception:  # it needs more than a Linear has
        return False
    return (
        isinstance(output, Tensor)
        and output.shape == (3, 5)
        and torch.allclose(output, F.linear(x, weight, bias), atol=1e-5)
    )


def _is_linear(linear: nn.Linear) -> bool:
    kind: Any = type(linear)
    return kind.forward is nn.Linear.forward or _computes_as_linear(kind)


def _watch(linear: nn.Linear, on_read: Callable[[], None]) -> None:
    """Call `on_read` when the weight or bias of `linear` is read outside its own forward."""
    linear.__dict__.update(_on_read=on_read, _in_forward=False)
    kind: Any = type(linear)
    linear.__class__ = _watched(kind)


@functools.cache
def _watched(kind: Any) -> Any:
    def read(self: Any, key: str) -> Any:
        if key in ("weight", "bias") and not self.__dict__["_in_forward"]:
            self.__dict__["_on_read"]()
        return super(watched, self).__getattr__(key)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_in_forward"] = True
        try:
            return super(watched, self).forward(*args, **kwargs)
        finally:
            self.__dict__["_in_forward"] = False

    watched: Any = type(kind.__name__, (kind,), {"__getattr__": read, "forward": forward})
    return watched


# Blocks


class _Chain:
    """Records the outputs of the blocks, and whether each block receives the hidden states of the block before and no
    other tensor that blocks made."""

    def __init__(self, blocks: Mapping[str, nn.Module]):
        self.outputs: dict[str, int] = {}
        self.broken: str | None = None if blocks else "it has no list of blocks"
        self._hidden: Tensor | None = None
        for name, block in blocks.items():
            block.register_forward_pre_hook(functools.partial(self._before, name), with_kwargs=True)
            block.register_forward_hook(functools.partial(self._after, name))

    def made_by_blocks(self, tensor: Tensor) -> bool:
        return getattr(tensor, "_made_by_blocks", False)

    def _before(self, name: str, block: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.broken:
            return
        if name in self.outputs:
            self.broken = f"{name} is called twice"
        elif not args or not isinstance(args[0], Tensor):
            self.broken = f"{name} is not given hidden states first"
        elif self._hidden is not None and args[0] is not self._hidden:
            self.broken = f"{name} is given other hidden states than the block before it returns"
        elif any(isinstance(leaf, Tensor) and self.made_by_blocks(leaf) for leaf in tree_leaves((args[1:], kwargs))):
            self.broken = f"{name} is given more of the blocks before it than their hidden states"

    def _after(self, name: str, block: nn.Module, args: tuple, output: Any) -> None:
        self.outputs[name] = len(output) if isinstance(output, tuple) else 0
        self._hidden = output[0] if isinstance(output, tuple) else output
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                leaf._made_by_blocks = True  # type: ignore[attr-defined]


# Values


class _Values(TorchDispatchMode):
    """Supplies the values that a forward asks of meta tensors, and records lookups in tables other than the input
    embeddings."""

    def __init__(self, model: PreTrainedModel, chain: _Chain):
        super().__init__()
        self.rows: set[int] = set()
        self._chain = chain
        embeddings: Any = model.get_input_embeddings()
        self._embeddings = embeddings.weight.untyped_storage()._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # transformers asks whether the positions follow one another, and they do
        if args and isinstance(args[0], Tensor) and args[0].untyped_storage()._cdata != self._embeddings:
            self.rows.update(_rows_looked_up(func, args))
        output = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and self._chain.made_by_blocks(leaf) for leaf in tree_leaves((args, kwargs))):
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    leaf._made_by_blocks = True  # type: ignore[attr-defined]
        return output


def _rows_looked_up(func: Any, args: tuple) -> Iterator[int]:
    """The sizes of the dimensions of a table that this operation indexes."""
    aten, shape = torch.ops.aten, args[0].shape
    if func is aten.embedding.default:
        yield shape[0]
    elif func in (aten.index_select.default, aten.gather.default):
        yield shape[args[1]]
    elif func is aten.index.Tensor:
        yield from (shape[i] for i, index in enumerate(args[1]) if index is not None)


@contextmanager
def _experts_by_shape(model: PreTrainedModel) -> Iterator[None]:
    """Run mixtures of experts by the implementation whose shapes do not depend on values."""
    before = model.config._experts_implementation
    model.config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        model.config._experts_implementation = before

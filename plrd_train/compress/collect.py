"""Statistics of the Linears of a live sharded model, by passes over calibration text.

Each rank adds up its own part of the text; the sums then go to the ranks that factor the Linears (`owners`). Linears
that receive the same input (query, key and value; gate and up) share one sum. The Linears are taken in windows, in the
order in which the model calls them, with one pass over the text for each window. So the sums that a rank holds at once
stay below a bound: those of a whole 7B model take 21 GB.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from plrd_train.compress.contracts import DecompositionError, Live, Shards
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import owners
from plrd_train.compress.statistics import STATISTICS, Statistic

WINDOW_BYTES = 8 * 2**30


def collect(
    engine: Live,
    statistic: str,
    shapes: Mapping[str, Shape],
    names: Collection[str],
    batches: Sequence[Tensor],
    window_bytes: int = WINDOW_BYTES,
) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Yield the Linears `names` window by window, each with the statistics of those Linears that this rank owns, as
    `plrd_train.compress.rounds.decompose` takes them.

    `batches` are those of this rank, each (n, length) token ids; a rank may have none. How the text is split changes
    the result by rounding alone. `shapes` are the present shapes of the Linears. The sums of a window take at most
    `window_bytes` on each rank, or the size of one sum where that is more. The model is left unchanged, without
    gradients. Each step of the iteration is a collective.

    Raises DecompositionError, on every rank alike, where the model does not call one of the Linears, or a Linear
    receives no token.
    """
    chosen = STATISTICS.get(statistic)
    engine.model.eval()
    groups = distinct_inputs(engine.model, names, lambda: logits_of(engine, None))
    called = {name for group in groups for name in group}
    for name in names:
        if name not in called:
            raise DecompositionError(f"{name}: the model does not call it, so that no calibration text can reach it")
    if chosen.USES_GRADIENTS:
        groups = [(name,) for group in groups for name in group]
    for window in _windows(groups, shapes, chosen, window_bytes):
        part = [name for group in window for name in group]
        owner = owners(shapes, part, engine.world_size)
        sums = [Sum(chosen, torch.zeros(chosen.size(shapes[group[0]]), device=engine.device)) for group in window]
        (_backward if chosen.USES_GRADIENTS else _forward)(
            engine, {group[0]: one for group, one in zip(window, sums, strict=True)}, batches
        )
        counts = [sum(parts) for parts in zip(*engine.share([one.count for one in sums]), strict=True)]
        own: dict[str, Tensor] = {}
        for group, count in zip(window, counts, strict=True):
            if not count:
                raise DecompositionError(f"{group[0]}: no token of the calibration text reaches it")
            mean = sums.pop(0).mean(engine, count, {owner[name] for name in group})
            if mean is not None:
                own.update((name, mean) for name in group if owner[name] == engine.rank)
        yield part, own


def distinct_inputs(model: nn.Module, linears: Collection[str], run: Callable[[], object]) -> list[tuple[str, ...]]:
    """The `linears` that `model` calls while `run` runs it, in the order of the calls. Linears that receive the same
    tensor share a tuple."""
    calls: dict[str, tuple[Any, ...]] = {}

    def note(name: str, x: Tensor) -> None:
        # A weak reference keeps no memory alive, and never equals a reference to memory that is allocated later.
        place = StorageWeakRef(x.untyped_storage()), x._version, x.storage_offset(), x.shape, x.stride()
        calls[name] = (*calls.get(name, ()), place)

    with hooked(model, linears, lambda name: lambda module, given: note(name, given[0])), torch.no_grad():
        run()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, places in calls.items():
        groups.setdefault(places, []).append(name)
    return [tuple(names) for names in groups.values()]


@contextmanager
def hooked(
    model: nn.Module, linears: Collection[str], hook: Callable[[str], Callable[..., Any]], after: bool = False
) -> Iterator[None]:
    """In this context these Linears call their hooks before (or after) they run. Compiled blocks, which would skip
    hooks, run eagerly."""
    with ExitStack() as stack:
        for name in linears:
            module = model.get_submodule(name)
            handle = module.register_forward_hook(hook(name)) if after else module.register_forward_pre_hook(hook(name))
            stack.callback(handle.remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@dataclass
class Sum:
    """This rank's part of one statistic: a sum of `count` terms."""

    statistic: Statistic
    total: Tensor
    count: int = 0
    counting: bool = True  # False while a rank without text takes part in the passes of the others

    def add(self, x: Tensor, grad: Tensor | None = None) -> None:
        """Add inputs `x` (…, in) and, for a statistic that uses gradients, `grad` (…, out)."""
        if self.counting:
            grad = x.new_empty(1, 0) if grad is None else grad
            self.count += self.statistic.add(self.total, x.flatten(0, -2).float(), grad.flatten(0, -2).float())

    def mean(self, engine: Shards, count: int, owners: Collection[int]) -> Tensor | None:
        """The statistic over the text of all ranks, whose sums have `count` terms together, on the ranks `owners`; None
        on the others. A collective. The sum must not be used afterwards."""
        total = added_up(engine, self.total, owners)
        return None if total is None else self.statistic.mean(total, count)


def added_up(engine: Shards, total: Tensor, owners: Collection[int]) -> Tensor | None:
    """The sum over the ranks of `total`, which is overwritten, on the ranks `owners`; None on the others. A
    collective."""
    if engine.world_size > 1:
        if len(owners) == 1:
            dist.reduce(total, dst=min(owners))
        else:
            dist.all_reduce(total)
    return total if engine.rank in owners else None


def _windows(
    groups: Sequence[tuple[str, ...]], shapes: Mapping[str, Shape], statistic: Statistic, limit: int
) -> Iterator[list[tuple[str, ...]]]:
    window: list[tuple[str, ...]] = []
    held = 0
    for group in groups:
        size = 4 * torch.Size(statistic.size(shapes[group[0]])).numel()
        if window and held + size > limit:
            yield window
            window, held = [], 0
        window.append(group)
        held += size
    if window:
        yield window


@torch.no_grad()
def _forward(engine: Live, sums: Mapping[str, Sum], batches: Sequence[Tensor]) -> None:
    """One pass over the text, which adds the inputs of each Linear to the sum of its name."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, given: sums[name].add(given[0])

    with hooked(engine.model, sums, hook):
        for batch in in_step(engine, batches, sums):
            logits_of(engine, batch)


def _backward(engine: Live, sums: Mapping[str, Sum], batches: Sequence[Tensor]) -> None:
    """One pass over the text, one sequence at a time, which adds inputs and gradients. It computes no gradient of a
    parameter."""
    anchor = torch.zeros((), device=engine.device, requires_grad=True)

    def hook(name: str) -> Callable[..., Tensor]:
        return lambda module, given, output: _Tap.apply(output, given[0], anchor, sums[name])

    with hooked(engine.model, sums, hook, after=True), torch.enable_grad():
        for ids in in_step(engine, [row[None] for batch in batches for row in batch], sums):
            logits, ids = logits_of(engine, ids)
            nll = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            torch.autograd.grad(nll, anchor)


class _Tap(torch.autograd.Function):
    """The identity on the output of a Linear, whose backward pass adds the gradient to a sum. `anchor`, a scalar that
    requires a gradient, makes autograd run that backward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, to: Sum) -> Tensor:
        ctx.save_for_backward(x)
        ctx.to = to
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.to.add(ctx.saved_tensors[0], grads[0])
        return grads[0], None, grads[0].new_zeros(()), None


def in_step(
    engine: Live, batches: Sequence[Tensor], sums: Mapping[str, Sum] = MappingProxyType({})
) -> Iterator[Tensor | None]:
    """This rank's batches, and then None while other ranks have more, since all ranks must run the sharded layers
    alike. The `sums` do not count what is run for None."""
    for step in range(max(engine.share(len(batches)))):
        for one in sums.values():
            one.counting = step < len(batches)
        yield batches[step] if step < len(batches) else None


def logits_of(engine: Live, batch: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits of a batch (n, length), and the batch on the device; for None those of two tokens."""
    ids = (torch.zeros(1, 2, dtype=torch.long) if batch is None else batch).to(engine.device)
    return engine.model(input_ids=ids, use_cache=False).logits, ids

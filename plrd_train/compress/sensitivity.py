"""What the model's loss grows by where one Linear alone is factored: the measurements that `ranks=sensitivity` splits
its budget by.

The model runs as it is, sharded; in the place of the one Linear's output stands that of its factors, which are cut from
its decomposition (`plrd_train.compress.rounds.Spectra`) on its owner and are whole on every rank for as long. So memory
grows by the factors of one Linear, and the cost is L + 1 forward passes over the text for L Linears, paid once for a
model, whatever the ratios. A 7B model has 224 of them: with 16,384 tokens of text 3.7M tokens of forward, as much
arithmetic as training on 1.2M.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plrd_train.compress.blocks import gathered
from plrd_train.compress.calibration import hooked, in_step, logits_of
from plrd_train.compress.contracts import DecompositionError, Live
from plrd_train.compress.linear import LowRankLinear
from plrd_train.compress.ranks import Measured, Shape
from plrd_train.compress.rounds import Spectra

# The share of its present parameters that a Linear is measured at. More than one such measurement of each bettered
# little (docs/log.md).
SHARE = 0.4


def point(shape: Shape) -> int:
    """The rank at which a Linear of that shape is measured: at `SHARE` of the parameters that it has now, at least rank
    1."""
    return max(shape.most_rank(SHARE * shape.params(shape.rank)), 1)


@torch.no_grad()
def measure(
    engine: Live,
    spectra: Spectra,
    shapes: Mapping[str, Shape],
    batches: Sequence[Tensor],
    on_done: Callable[[str], object] = lambda name: None,
) -> dict[str, Measured]:
    """For each Linear of `shapes`, all added to `spectra`: its `point`, and what the mean nll of the text grows by with
    it alone at that rank.

    `batches` are this rank's own, each (n, length) token ids; a rank may have none, and how the text is split changes
    the result by rounding alone. The model is left as it is. The same on every rank. A collective. Raises
    DecompositionError, on every rank alike, where there is no token to predict or the model's loss is not finite.
    """
    engine.model.eval()
    whole = _loss(engine, batches)
    measured: dict[str, Measured] = {}
    for name, shape in shapes.items():
        rank = point(shape)
        with _instead(engine, name, spectra.whole(name, rank)):
            measured[name] = rank, _loss(engine, batches) - whole
        on_done(name)
    return measured


@contextmanager
def _instead(engine: Live, name: str, factors: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Inside, these factors give the output of the Linear `name`; its bias stays. A collective."""
    holder = f"{name}.up" if isinstance(engine.model.get_submodule(name), LowRankLinear) else name
    has_bias = engine.model.get_submodule(holder).bias is not None
    bias = gathered(engine)(f"{holder}.bias", torch.Size([len(factors[0])])) if has_bias else None

    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        up, down = (factor.to(output.dtype) for factor in factors)
        return F.linear(F.linear(given[0].to(output.dtype), down), up, None if bias is None else bias.to(output.dtype))

    with hooked(engine.model, [name], lambda name: hook, after=True):
        yield


def _loss(engine: Live, batches: Sequence[Tensor]) -> float:
    """The mean nll of all tokens of the text that are predicted, over all ranks."""
    nll, count = 0.0, 0
    for batch in in_step(engine, batches):
        logits, ids = logits_of(engine, batch)
        if batch is not None:
            nll += F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            count += ids[:, 1:].numel()
    total, tokens = (sum(parts) for parts in zip(*engine.share((nll, count)), strict=True))
    if not tokens:
        raise DecompositionError("the calibration text holds no token to measure the loss on")
    if not total < float("inf"):
        raise DecompositionError(f"the loss on the calibration text is {total / tokens}")
    return total / tokens

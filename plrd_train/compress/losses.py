"""How much the loss of the model grows with one Linear alone factored.

The model runs sharded, as it is. The output of the one Linear is replaced by that of its factors. They are cut from its
decomposition (`plrd_train.compress.rounds.Spectra`) on its owner, and every rank holds them whole meanwhile. So memory
grows by the factors of one Linear. The cost is L + 1 forward passes over the text for L Linears, once for a model,
whatever the number of ratios. A 7B model has 224 Linears: with 16,384 tokens of text that is 3.7M tokens of forward, as
much arithmetic as training on 1.2M.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plrd_train.compress.blocks import gathered
from plrd_train.compress.collect import hooked, in_step, logits_of
from plrd_train.compress.contracts import DecompositionError, Live
from plrd_train.compress.linear import LowRankLinear
from plrd_train.compress.rounds import Spectra


@torch.no_grad()
def measure(
    engine: Live,
    spectra: Spectra,
    ranks: Mapping[str, int],
    batches: Sequence[Tensor],
    on_done: Callable[[str], object] = lambda name: None,
) -> dict[str, float]:
    """For each Linear of `ranks`, all of which were added to `spectra`: the increase of the mean nll of the text with
    that Linear alone cut at that rank.

    `batches` are those of this rank, each (n, length) token ids; a rank may have none. How the text is split changes
    the result by rounding alone. The model is left unchanged. The result is the same on every rank. A collective.
    Raises DecompositionError, on every rank alike, where there is no token to predict or the loss is not finite.
    """
    engine.model.eval()
    whole = _loss(engine, batches)
    increases: dict[str, float] = {}
    for name, rank in ranks.items():
        with _replaced(engine, name, spectra.whole(name, rank)):
            increases[name] = _loss(engine, batches) - whole
        on_done(name)
    return increases


@contextmanager
def _replaced(engine: Live, name: str, factors: tuple[Tensor, Tensor]) -> Iterator[None]:
    """In this context the output of the Linear `name` is that of these factors, plus its own bias. A collective."""
    holder = f"{name}.up" if isinstance(engine.model.get_submodule(name), LowRankLinear) else name
    has_bias = engine.model.get_submodule(holder).bias is not None
    bias = gathered(engine)(f"{holder}.bias", torch.Size([len(factors[0])])) if has_bias else None

    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        up, down = (factor.to(output.dtype) for factor in factors)
        return F.linear(F.linear(given[0].to(output.dtype), down), up, None if bias is None else bias.to(output.dtype))

    with hooked(engine.model, [name], lambda name: hook, after=True):
        yield


def _loss(engine: Live, batches: Sequence[Tensor]) -> float:
    """The mean nll of all predicted tokens of the text, over all ranks."""
    nll, count = 0.0, 0
    for batch in in_step(engine, batches):
        logits, ids = logits_of(engine, batch)
        if batch is not None:
            nll += F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            count += ids[:, 1:].numel()
    total, tokens = (sum(parts) for parts in zip(*engine.share((nll, count)), strict=True))
    if not tokens:
        raise DecompositionError("the calibration text holds no token to measure the loss on")
    mean: float = total / tokens
    if not mean < float("inf"):
        raise DecompositionError(f"the loss on the calibration text is {mean}")
    return mean

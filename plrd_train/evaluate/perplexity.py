"""Held-out perplexity, by a definition that depends on no sequence length, engine or number of ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from plrd_train.data.documents import EvalDocument
from plrd_train.evaluate import OnRanks, Subject


@dataclass(frozen=True)
class Evaluator:
    """Perplexity on the first `context` tokens of each document, at most `tokens` predicted ones in all, `batch`
    documents at once on a rank."""

    published: ClassVar[bool] = False

    context: int
    tokens: int
    batch: int

    def __call__(self, subject: Subject) -> dict[str, Any]:
        return perplexity(subject.on, subject.documents, self.batch, subject.on_tokens).to_dict()


@dataclass(frozen=True)
class Perplexity:
    """Summed negative log-likelihood (nats) of `tokens` predicted tokens, in total and as (nll, tokens) by domain."""

    nll: float
    tokens: int
    domains: dict[str, tuple[float, int]]

    @property
    def loss(self) -> float:
        return self.nll / self.tokens

    @property
    def ppl(self) -> float:
        """exp of the mean nll; infinite where that overflows."""
        return exp(self.loss)

    def to_dict(self) -> dict:
        """As family.json holds it; what is not finite, which JSON cannot say, is None."""
        by_domain = {name: _finite(exp(nll / tokens)) for name, (nll, tokens) in sorted(self.domains.items())}
        return {"ppl": _finite(self.ppl), "nll_tokens": self.tokens, "domains": by_domain}


def exp(loss: float) -> float:
    """e to the `loss`; infinite where that overflows, NaN of NaN."""
    return math.inf if loss >= 700 else math.exp(loss)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@torch.no_grad()
def perplexity(
    engine: OnRanks, documents: Sequence[EvalDocument], batch: int, on_tokens: Callable[[int], None] | None = None
) -> Perplexity:
    """exp(sum of nll / predicted tokens) over `documents` one by one, no packing, on the engine's weights as they are.
    A collective.

    `batch` documents of about the same length go through the model at once, padded on the right, where causal attention
    does not look. `on_tokens` is told, batch by batch, how many tokens this rank has predicted.
    """
    engine.model.eval()
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].ids))
    own = order[engine.rank :: engine.world_size]
    sums: dict[str, list[float]] = {}
    # Sharded layers are gathered together: every rank runs as many batches as the first, which has the most documents.
    for start in range(0, math.ceil(len(documents) / engine.world_size), batch):
        chosen = [documents[i] for i in own[start : start + batch]]
        width = max((len(document.ids) for document in chosen), default=2)
        ids = torch.zeros(max(len(chosen), 1), width, dtype=torch.long)
        for row, document in enumerate(chosen):
            ids[row, : len(document.ids)] = torch.tensor(document.ids)
        ids = ids.to(engine.device)
        logits = engine.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        for row, document in enumerate(chosen):
            domain = sums.setdefault(document.domain, [0.0, 0.0])
            domain[0] += nll[row, : len(document.ids) - 1].double().sum().item()
            domain[1] += len(document.ids) - 1
        if on_tokens is not None:
            on_tokens(sum(len(document.ids) - 1 for document in chosen))
    total: dict[str, tuple[float, int]] = {}
    for part in engine.share(sums):
        for name, (nll_sum, tokens) in part.items():
            before = total.get(name, (0.0, 0))
            total[name] = (before[0] + nll_sum, before[1] + int(tokens))
    return Perplexity(sum(nll for nll, _ in total.values()), sum(tokens for _, tokens in total.values()), total)

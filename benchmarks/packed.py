"""What to train of a `pifa` member: pairs of factors that are packed at the end (ours), or the packed matrices (other).

Both start from the same whitened factors of the same parent and read the same text, each at its own best learning
rate. All numbers are held-out perplexity over the parent's. Further rows tell what packing and rounding to bfloat16
cost a pair. It needs the test assets (PLRD_ASSETS). `python -m benchmarks.packed [SEED …]` tries all RATES, and prints
a line of JSON for each training.
"""

import copy
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import Row
from plrd_train.compress.algebra.truncate import Spectral
from plrd_train.compress.collect import collect
from plrd_train.compress.forms import pifa
from plrd_train.compress.linear import LowRankLinear
from plrd_train.compress.methods.whitened import Method
from plrd_train.compress.ranks import Shape
from plrd_train.compress.surgery import eligible_linears, replace_linears
from plrd_train.data.calibration import calibration_batches
from plrd_train.data.corpus import resolve_corpus
from plrd_train.data.documents import EvalDocument, evaluation_documents
from plrd_train.data.loader import Loader
from plrd_train.evaluate.perplexity import perplexity
from plrd_train.parents.published import Published, find_published, open_published

ASSETS = Path(os.environ.get("PLRD_ASSETS", "../shared"))
PARENT, CORPUS = ASSETS / "parents" / "stories260k", ASSETS / "data" / "tinystories"
ADAMW = Path(__file__).parents[1] / "conf" / "recover" / "adamw.yaml"
RATIOS, OBJECTIVES = (1.25, 2.25), ("ce", "distill")
RATES = {1.25: (2.5e-4, 5e-4, 7e-4, 1e-3, 2e-3, 4e-3, 8e-3), 2.25: (1e-3, 2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3)}
# The best of these for seed 0: of pairs, and of packed matrices.
BEST = {
    ("ce", 1.25): (7e-4, 7e-4),
    ("distill", 1.25): (1e-3, 7e-4),
    ("ce", 2.25): (4e-3, 2.8e-3),
    ("distill", 2.25): (4e-3, 4e-3),
}
TRAINED, BATCH, SEQ_LEN, CALIBRATION = 100_000, 1024, 256, 131_072  # tokens
CONTEXT, HELD_OUT = 256, 50_000  # tokens of a document, predicted tokens in all


def rows() -> Iterator[Row]:
    if not PARENT.is_dir():
        print(f"packed: no test assets in {ASSETS} (set PLRD_ASSETS)")
        return
    bench = Bench.open(seed=0)
    for ratio in RATIOS:
        start = bench.pairs(ratio)
        shape = f"stories260k at {ratio:g}x"
        yield from _published("untrained", bench, start, shape)
        for objective in OBJECTIVES:
            pair_rate, packed_rate = BEST[objective, ratio]
            pairs = bench.train(start, objective, pair_rate)
            packed = bench.train(pack(start), objective, packed_rate)
            multiples = bench.multiple(pack(pairs)), bench.multiple(packed)
            yield Row(f"pairs trained, and packed: {objective}", *multiples, "x parent", shape)
            yield from _published(objective, bench, pairs, shape)


def _published(name: str, bench: "Bench", pairs: nn.Module, shape: str) -> Iterator[Row]:
    """Pairs (ours) against the same pairs packed (other): in float32, and with the weights of the Linears rounded."""
    models = pairs, pack(pairs)
    for dtype, as_published in (("fp32", lambda model: model), ("bf16", in_bf16)):
        multiples = [bench.multiple(as_published(model)) for model in models]
        yield Row(f"pairs, and these packed: {name}, {dtype}", *multiples, "x parent", shape)


@dataclass(frozen=True)
class Bench:
    """The parent, its `base` perplexity, its decomposed Linears, and `batches` (sequences, SEQ_LEN) to train on."""

    parent: Published
    base: float
    spectra: dict[str, Spectral]
    batches: Sequence[Tensor]
    documents: Sequence[EvalDocument]

    @classmethod
    def open(cls, seed: int) -> "Bench":
        """`seed` orders the text, that of calibration too."""
        parent = open_published(find_published(str(PARENT)), torch.float32)
        corpus, tokenizer = resolve_corpus(str(CORPUS), "train"), parent.tokenizer
        order: dict[str, Any] = {"seq_len": SEQ_LEN, "streams": 8, "seed": seed, "append_eos": False}
        order |= {"rank": 0, "world_size": 1}
        calibration = calibration_batches(corpus, tokenizer, tokens=CALIBRATION, batch=16, **order)
        with closing(Loader(corpus, tokenizer, **order)) as loader:
            batches = [loader.next(BATCH // SEQ_LEN).input_ids for _ in range(math.ceil(TRAINED / BATCH))]
        documents = evaluation_documents(resolve_corpus(str(CORPUS), "validation"), tokenizer, CONTEXT, HELD_OUT)
        base = perplexity(parent, documents, 16).ppl
        return cls(parent, base, _decomposed(parent, calibration), batches, documents)

    def pairs(self, ratio: float) -> nn.Module:
        """The parent with whitened pairs for its Linears, of the largest ranks whose packed form has that ratio."""
        model = copy.deepcopy(self.parent.model)
        sizes = {name: (linear.out_features, linear.in_features) for name, linear in eligible_linears(model)}
        ranks = {name: pifa.most_rank(*size, math.prod(size) / ratio) for name, size in sizes.items()}
        replace_linears(model, ranks)
        for name, rank in ranks.items():
            factors = self.spectra[name].cut(rank)
            model.get_submodule(name).set_factors(factors.up, factors.down)
        return model

    def multiple(self, model: nn.Module) -> float:
        """The perplexity of `model` over the parent's."""
        return perplexity(replace(self.parent, model=model), self.documents, 16).ppl / self.base

    def train(self, start: nn.Module, objective: str, peak: float) -> nn.Module:
        """A copy of `start`, trained on all batches with a linear warm-up to `peak` and a linear decay to zero."""
        model, settings = copy.deepcopy(start).train().requires_grad_(True), OmegaConf.load(ADAMW)
        parameters = list(model.parameters())
        groups = [
            {"params": [one for one in parameters if one.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=tuple(settings.betas), eps=settings.eps, fused=True)
        steps, loss = len(self.batches), self._loss(objective)
        warm = math.ceil(settings.warmup * steps)

        def share(step: int) -> float:
            return min((step + 1) / warm, (steps - step) / (steps - warm + 1))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        for ids in self.batches:
            ids = ids.to(self.parent.device)
            loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
            nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return model

    def _loss(self, objective: str) -> Callable[[Tensor, Tensor], Tensor]:
        """The mean over tokens of the cross-entropy, or of KL(parent || model)."""

        def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

        def divergence(logits: Tensor, ids: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.parent.model(input_ids=ids, use_cache=False).logits
            own, target = (one.flatten(0, 1).log_softmax(-1) for one in (logits, target))
            return F.kl_div(own, target, log_target=True, reduction="batchmean")

        return {"ce": cross_entropy, "distill": divergence}[objective]


def _decomposed(parent: Published, calibration: Sequence[Tensor]) -> dict[str, Spectral]:
    """Every eligible Linear of the parent, decomposed in the metric of its inputs on the `calibration` text."""
    linears = dict(eligible_linears(parent.model))
    shapes = {name: Shape.of(linear) for name, linear in linears.items()}
    method, spectra = Method(calibration_tokens=CALIBRATION), {}
    for names, moments in collect(parent, "inputs", shapes, list(shapes), calibration):
        spectra.update({name: method.dense(linears[name].weight, moments[name]) for name in names})
    return spectra


def pack(model: nn.Module) -> nn.Module:
    """A copy of `model` with its pairs packed, which have no biases in this parent."""
    model = copy.deepcopy(model)
    pairs = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    for name, pair in pairs:
        up, down = pifa.pack(pair.up.weight.detach(), pair.down.weight.detach())
        linear = pifa.Linear(pair.in_features, pair.out_features, pair.rank).to(up.device)
        linear.load_state_dict(pifa.stored("up.weight", up) | pifa.stored("down.weight", down))
        model.set_submodule(name, linear)
    return model


@torch.no_grad()
def in_bf16(model: nn.Module) -> nn.Module:
    """A copy of `model` with the weights of its pairs, or of what they are packed to, rounded to bfloat16."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (LowRankLinear, pifa.Linear)):
            for weight in module.parameters():
                weight.copy_(weight.bfloat16())
    return model


def grid(seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every rate for every ratio, objective and parametrisation."""
    for seed in seeds:
        bench = Bench.open(seed)
        for ratio, objective in product(RATIOS, OBJECTIVES):
            pairs = bench.pairs(ratio)
            for rate, (trained, start) in product(RATES[ratio], (("pairs", pairs), ("packed", pack(pairs)))):
                line = {"seed": seed, "ratio": ratio, "objective": objective, "trained": trained, "rate": rate}
                yield line | {"x parent": bench.multiple(bench.train(start, objective, rate))}


if __name__ == "__main__":
    for line in grid([int(seed) for seed in sys.argv[1:]] or [0]):
        print(json.dumps(line), flush=True)

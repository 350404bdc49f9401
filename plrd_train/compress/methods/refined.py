"""`refined`: each Linear is anchored to its original outputs, then the factors of a block are trained together (AA-SVD,
arXiv 2604.02119).

Let x be the input of a Linear in the original model, and x' its input once everything before it is factored. The pair
minimises E||W x - up down x'||^2 (the paper's anchored and adaptive objective). So it is the pair nearest to W A, A =
E[x x'^T] E[x' x'^T]^-1, in the metric of x'. Then all factors of the block are trained by Adam, for some passes over
the text, on the squared error between the outputs of the factored block on its present inputs and those of the original
block on the original inputs. The original model is that at the start of the stage: the parent in the first stage, the
trained trunk in later ones.

The paper also trains the norms of the block. Here they stay fixed, as do biases and Linears that keep their rank: a
scale of a Linear's input can move into its `down` factor. The paper has one learning rate; here that of each factor is
relative to its entries.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plrd_train.compress.algebra.gram import symmetrized
from plrd_train.compress.algebra.metrics import FLOOR, whitening
from plrd_train.compress.algebra.truncate import Spectral, of_dense, of_product, peak_bytes
from plrd_train.compress.collect import added_up
from plrd_train.compress.contracts import Block, BlockTask, FactorReport, Shards
from plrd_train.compress.linear import LowRankLinear
from plrd_train.compress.ranks import Shape
from plrd_train.compress.steps import Step, factor_step, input_of, steps, total_tokens

# Ridge that pulls A towards the identity, relative to the second moment of each channel. It is well above the rounding
# of float32 sums, which is relative to the channels too; and a massive activation in one channel blurs no other.
RIDGE = 1e-5
BETAS = (0.9, 0.95)
WARMUP = 0.1  # share of a block's steps


@dataclass(frozen=True)
class Method:
    """The inputs are those on `calibration_tokens` of the training corpus. Each block is trained on them in `epochs`
    passes, in steps of about `batch_tokens` tokens over all ranks. At the peak of the learning rate a step moves an
    entry of a factor by about `rate` times the root mean square of its entries. With 0 epochs the pairs are those of
    the closed form."""

    sequential: ClassVar[bool] = True
    keeps_original: ClassVar[bool] = True
    trains_blocks: ClassVar[bool] = True
    statistic: ClassVar[str | None] = "inputs"

    calibration_tokens: int
    epochs: int
    batch_tokens: int
    rate: float

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_tokens", 1), ("rate", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")

    def dense(self, weight: Tensor, statistic: Tensor) -> Spectral:
        return of_dense(weight, right=whitening(statistic))

    def product(self, up: Tensor, down: Tensor, statistic: Tensor) -> Spectral:
        return of_product(up, down, right=whitening(statistic))

    def peak_bytes(self, shape: Shape) -> int:
        square, weight = shape.in_features**2, (shape.rank or shape.out_features) * shape.in_features
        # Both moments, and four matrices while A is solved for; then A, the weight and W A; then W A decomposed.
        return 2 * 4 * square + max(
            4 * 8 * square, 8 * (square + 2 * weight), 4 * weight + peak_bytes(shape, right="moment")
        )

    def factor_block(self, task: BlockTask) -> dict[str, FactorReport]:
        engine, block, original = task.engine, task.block, task.original
        assert original is not None
        reports: dict[str, FactorReport] = {}
        for step in steps(engine, block, task.linears):
            moment, cross = _moments(engine, original, block, step, task.shapes)
            reports |= factor_step(task, step, partial(self._anchored, moment=moment, cross=cross))
            del moment, cross  # before the next ones are made, or the block runs
        start = time.perf_counter()
        self._refine(engine, original, block, task.linears)
        trained = (time.perf_counter() - start) / max(len(reports), 1)
        return {
            name: FactorReport(report.owner, report.seconds + trained, _rel_error(original, block, name), None)
            for name, report in reports.items()
        }

    def _anchored(self, linear: nn.Module, moment: Tensor, cross: Tensor) -> Spectral:
        """W A decomposed in the metric of x', for a Linear W of a block; `moment` is E[x' x'^T], `cross` is E[x x'^T],
        both (in, in)."""
        if isinstance(linear, LowRankLinear):
            return self.product(linear.up.weight, _anchored(linear.down.weight, moment, cross), moment)
        assert isinstance(linear, nn.Linear)
        return self.dense(_anchored(linear.weight, moment, cross), moment)

    def _refine(self, engine: Shards, original: Block, block: Block, linears: Sequence[str]) -> None:
        """Train the factors of the block's `linears`. They are restored where the outputs have come no nearer to those
        of the original block."""
        targets = original.outputs()
        factors = _factors(block, linears)
        if not (self.epochs and factors):
            return
        square, tokens = (
            sum(parts)
            for parts in zip(*engine.share((_square(targets), sum(t.shape[:2].numel() for t in targets))), strict=True)
        )
        old, error = [factor.clone() for factor in factors], _error(engine, block, targets)
        parts = _parts(engine, targets, round(tokens / self.batch_tokens))
        optimizer = torch.optim.Adam(
            [{"params": [factor], "rate": self.rate * _rms(factor)} for factor in factors], betas=BETAS
        )
        total = self.epochs * len(parts)
        for i in range(total):
            own, of_all = parts[i % len(parts)]
            warm = min(1.0, (i + 1) / (WARMUP * total))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * warm * (1 - i / total)
            with torch.enable_grad():
                for batch in own:
                    lost = (block.run(batch) - targets[batch]).square().sum()
                    (lost * (tokens / of_all / square)).backward()
            _add_up(engine, factors)
            optimizer.step()
            optimizer.zero_grad()
        if not _error(engine, block, targets) < error:
            for factor, exact in zip(factors, old, strict=True):
                factor.copy_(exact)
        block.module.requires_grad_(False)


def anchoring(moment: Tensor, cross: Tensor) -> Tensor:
    """A = cross moment^-1 (n, n) in float64: the linear map from the present to the original inputs of least squared
    error, and the identity in directions that the text does not show. Raises ValueError where a moment holds NaN or
    Inf."""
    if not (torch.isfinite(moment).all() and torch.isfinite(cross).all()):
        raise ValueError("its inputs on the calibration text, or their squares, are no finite float32 numbers")
    moment, cross = moment.to(torch.float64, copy=True), cross.to(torch.float64, copy=True)
    squares = moment.diagonal().clone()
    ridge = RIDGE * squares.clamp_min(FLOOR * squares.max().item() or 1.0)
    for sums in (moment, cross):
        sums.diagonal().add_(ridge)
    solution: Tensor = torch.linalg.solve(moment, cross.T)
    return solution.T


def _anchored(weight: Tensor, moment: Tensor, cross: Tensor) -> Tensor:
    anchor = anchoring(moment, cross)
    return (weight.double() @ anchor).float()


def _moments(
    engine: Shards, original: Block, block: Block, step: Step, shapes: Mapping[str, Shape]
) -> tuple[Tensor, Tensor]:
    """E[x' x'^T] and E[x x'^T], (in, in), of the inputs of the step in `block` and in `original`, on the owners; empty
    tensors on other ranks. A collective."""
    linear, size = step.linears[0], shapes[step.names[0]].in_features
    sums, count = torch.zeros(2, size, size, device=engine.device), 0
    for batch in range(len(block.inputs)):
        x, now = (input_of(one, linear, batch).flatten(0, -2) for one in (original, block))
        sums[0].addmm_(now.T, now)
        sums[1].addmm_(x.T, now)
        count += len(x)
    count = total_tokens(engine, step, count)
    total = added_up(engine, sums, step.owners(shapes, engine.world_size))
    if total is None:
        return sums.new_empty(0), sums.new_empty(0)
    total.div_(count)
    return symmetrized(total[0]), total[1]


def _factors(block: Block, linears: Sequence[str]) -> list[nn.Parameter]:
    """The factors of these Linears; no other parameter of the block requires a gradient from here on."""
    block.module.requires_grad_(False)
    modules: list[Any] = [block.module.get_submodule(linear) for linear in linears]
    return [factor.requires_grad_() for module in modules for factor in (module.up.weight, module.down.weight)]


def _parts(engine: Shards, targets: Sequence[Tensor], count: int) -> list[tuple[range, int]]:
    """The text in about `count` steps, each as this rank's batches and the number of tokens on all ranks. Where the
    sequences are dealt in turn, a step has the same text on any number of ranks that divides its sequences."""
    count = max(min(count, max(engine.share(len(targets)))), 1)
    own = [range(i * len(targets) // count, (i + 1) * len(targets) // count) for i in range(count)]
    tokens = engine.share([sum(targets[batch].shape[:2].numel() for batch in batches) for batches in own])
    return list(zip(own, map(sum, zip(*tokens, strict=True)), strict=True))


def _add_up(engine: Shards, factors: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their sum over the ranks. A collective."""
    if engine.world_size > 1:
        flat = torch.cat(
            [(torch.zeros_like(factor) if factor.grad is None else factor.grad).flatten() for factor in factors]
        )
        dist.all_reduce(flat)
        for factor, grad in zip(factors, flat.split([factor.numel() for factor in factors]), strict=True):
            factor.grad = grad.view_as(factor)


def _error(engine: Shards, block: Block, targets: Sequence[Tensor]) -> float:
    """The squared error of the block's outputs over all ranks. A collective."""
    total: float = sum(engine.share(_square(block.run(batch) - target for batch, target in enumerate(targets))))
    return total


def _square(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.square().sum().item() for tensor in tensors)


def _rms(factor: Tensor) -> float:
    return factor.square().mean().sqrt().item()


def _rel_error(original: Block, block: Block, name: str) -> float:
    """||W - up down||_F / ||W||_F of the Linear of that name; W is its weight in the original block."""

    def weight(module: Any) -> Tensor:
        return module.up.weight @ module.down.weight if isinstance(module, LowRankLinear) else module.weight

    was, now = (weight(one.module.get_submodule(name.removeprefix(f"{block.name}."))) for one in (original, block))
    norm = was.norm().item()
    return (was - now).norm().item() / norm if norm > 0 else 0.0

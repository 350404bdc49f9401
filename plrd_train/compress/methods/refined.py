"""`refined`: each Linear anchored to what it gave, then the factors of a block adjusted together (AA-SVD, arXiv
2604.02119).

With x what a Linear is given in the model as it was and x' what it is given once all before it is factored, its pair is
the one that minimises E||W x - up down x'||^2 (its anchored and adaptive objective): of the rank asked for, the nearest
to W A, A = E[x x'^T] E[x' x'^T]^-1, in the metric of x'. Then all factors of the block are trained for some passes over
the text, by Adam, on the squared error of the block's output, given what the blocks before it give now, against what
the block as it was gives of what it was given. "As it was" is at the start of the stage: in the first stage the parent;
in a later one the trunk, which has been trained since, and that is what there is to keep.

The paper also trains the norms of the block. Here they stay, as do biases and Linears that keep their rank: what scales
the input of a Linear can move into its `down` factor. The paper's learning rate is one number; here that of each factor
is relative to the factor's own entries.
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

# What counts as evidence that a channel is what it was, as a share of what the text gives of that channel. It lies well
# above the rounding of sums in float32, which is relative to the channels too; and a massive activation in one of them
# blurs no other.
RIDGE = 1e-5
BETAS = (0.9, 0.95)
WARMUP = 0.1  # share of a block's steps


@dataclass(frozen=True)
class Method:
    """`calibration_tokens` of the training corpus tell the inputs and are what each block is trained on, in `epochs`
    passes of steps of about `batch_tokens` over all ranks. A step at the peak moves an entry of a factor by about
    `rate` times the root mean square of its entries. With 0 epochs the pairs stay as they are found in closed form."""

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
        """A Linear W of a block as W A in the metric of its inputs now, of which E[x' x'^T] is the `moment` and E[x
        x'^T] the `cross` moment."""
        if isinstance(linear, LowRankLinear):
            return self.product(linear.up.weight, _anchored(linear.down.weight, moment, cross), moment)
        assert isinstance(linear, nn.Linear)
        return self.dense(_anchored(linear.weight, moment, cross), moment)

    def _refine(self, engine: Shards, original: Block, block: Block, linears: Sequence[str]) -> None:
        """Train the factors of the block's `linears`; where the outputs are no nearer to those of `before` after it,
        they are put back."""
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
    """A = cross moment^-1 (n, n) in float64, which makes of the inputs now those before, as well as that goes; the
    identity where the text does not tell. Raises ValueError where they hold NaN or Inf."""
    if not (torch.isfinite(moment).all() and torch.isfinite(cross).all()):
        raise ValueError(
            "what it is given on the calibration text is, or has squares that are, no finite float32 numbers"
        )
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
    """E[x' x'^T] and E[x x'^T], (in, in), of what the Linears of the step are given in `block` and `before`, on their
    owners; nothing elsewhere."""
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
    """The factors of these Linears, which alone of the block are trained from here on."""
    block.module.requires_grad_(False)
    modules: list[Any] = [block.module.get_submodule(linear) for linear in linears]
    return [factor.requires_grad_() for module in modules for factor in (module.up.weight, module.down.weight)]


def _parts(engine: Shards, targets: Sequence[Tensor], count: int) -> list[tuple[range, int]]:
    """Deal the text into about `count` steps: of each the batches of this rank, and the tokens of all ranks. With the
    sequences dealt in turn to the ranks, a step is of the same text on any number of ranks that its batches divide
    among."""
    count = max(min(count, max(engine.share(len(targets)))), 1)
    own = [range(i * len(targets) // count, (i + 1) * len(targets) // count) for i in range(count)]
    tokens = engine.share([sum(targets[batch].shape[:2].numel() for batch in batches) for batches in own])
    return list(zip(own, map(sum, zip(*tokens, strict=True)), strict=True))


def _add_up(engine: Shards, factors: Sequence[nn.Parameter]) -> None:
    """Let every rank have the sum of the ranks' gradients."""
    if engine.world_size > 1:
        flat = torch.cat(
            [(torch.zeros_like(factor) if factor.grad is None else factor.grad).flatten() for factor in factors]
        )
        dist.all_reduce(flat)
        for factor, grad in zip(factors, flat.split([factor.numel() for factor in factors]), strict=True):
            factor.grad = grad.view_as(factor)


def _error(engine: Shards, block: Block, targets: Sequence[Tensor]) -> float:
    """The squared error of the block's outputs over all ranks."""
    total: float = sum(engine.share(_square(block.run(batch) - target for batch, target in enumerate(targets))))
    return total


def _square(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.square().sum().item() for tensor in tensors)


def _rms(factor: Tensor) -> float:
    return factor.square().mean().sqrt().item()


def _rel_error(original: Block, block: Block, name: str) -> float:
    """||W - up down||_F / ||W||_F of the Linear of that name, W being as it was."""

    def weight(module: Any) -> Tensor:
        return module.up.weight @ module.down.weight if isinstance(module, LowRankLinear) else module.weight

    was, now = (weight(one.module.get_submodule(name.removeprefix(f"{block.name}."))) for one in (original, block))
    norm = was.norm().item()
    return (was - now).norm().item() / norm if norm > 0 else 0.0

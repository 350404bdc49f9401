"""`muon`: Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) on the matrices of the blocks, and AdamW on
all other parameters: embeddings, lm_head, norms and biases.

The update of a matrix is its momentum with all singular values brought close to 1, so it depends on the whole matrix.
Scaled as in Moonlight (arXiv 2502.16982), the root mean square of its elements is about 0.2 as in an update of AdamW,
so that one learning rate serves both.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor

from plrd_train.engine import Group, OnWhole
from plrd_train.settings import Rate, Share
from plrd_train.structure import Parameter

# Of the quintic iteration: it takes singular values to 0.7 .. 1.2 in five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2  # of an update's elements, at a rate of 1


def orthogonalized(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition U S V^T of `matrix` (m, n), about: its singular values lie between 0.7
    and 1.2. Computed by Newton-Schulz iterations, in bfloat16 on a GPU; float32. A matrix of zeros stays one."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).float()


@dataclass(frozen=True)
class Optimizer:
    """`momentum` is that of the matrices of blocks, in Nesterov's form; `betas` and `eps` are those of AdamW for the
    rest. Weight decay acts on all matrices."""

    momentum: Share
    betas: tuple[Share, Share]
    eps: Annotated[Rate, Field(gt=0.0)]
    weight_decay: Rate

    whole_matrices: ClassVar[bool] = True

    def group(self, parameter: Parameter) -> Group:
        if parameter.block and len(parameter.shape) == 2:
            return Group({"muon": True, "weight_decay": self.weight_decay}, ("momentum_buffer",))
        decay = self.weight_decay if len(parameter.shape) > 1 else 0.0
        return Group({"muon": False, "weight_decay": decay}, ("exp_avg", "exp_avg_sq"))

    def open(self, groups: list[dict[str, Any]], on_whole: OnWhole | None) -> torch.optim.Optimizer:
        assert on_whole is not None
        return _Muon(groups, self, on_whole)


class _Muon(torch.optim.Optimizer):
    """Muon on the groups with the option "muon", AdamW on the others."""

    def __init__(self, groups: Iterable[dict[str, Any]], settings: Optimizer, on_whole: OnWhole):
        super().__init__(groups, {"lr": 0.0})
        self._momentum, self._on_whole = settings.momentum, on_whole
        self.found_inf: Tensor | None = None
        self._rest = [group for group in self.param_groups if not group["muon"]]
        self._adamw = torch.optim.AdamW(
            [dict(group) for group in self._rest], betas=settings.betas, eps=settings.eps, fused=True
        )
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, inner in zip(self._rest, self._adamw.param_groups, strict=True):
            inner["lr"] = group["lr"]
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        assert self.found_inf is not None
        refused = self.found_inf.bool()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group, refused)

    def _step_matrices(self, group: dict[str, Any], refused: Tensor) -> None:
        def direction(parameter: Tensor) -> Tensor:
            """This rank's shard of the momentum after this gradient, in Nesterov's form; updates what is kept."""
            gradient = _local(cast(Tensor, parameter.grad))
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            kept = _local(state["momentum_buffer"])
            moved = kept.lerp(gradient, 1 - self._momentum)
            kept.copy_(torch.where(refused, kept, moved))
            return gradient.lerp(moved, self._momentum)

        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter, update in self._on_whole(trained, direction, orthogonalized):
            # The singular values of U V^T are 1: the root mean square of its elements is 1 / sqrt(the larger side).
            rate = RMS * math.sqrt(max(parameter.shape)) * group["lr"]
            weights = _local(parameter)
            moved = weights * (1 - group["lr"] * group["weight_decay"]) - rate * update
            weights.copy_(torch.where(refused, weights, moved))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

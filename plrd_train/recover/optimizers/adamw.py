"""`adamw`: AdamW (Loshchilov and Hutter, arXiv 1711.05101), PLRD as published."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from plrd_train.engine import Group, OnWhole
from plrd_train.settings import Rate, Share
from plrd_train.structure import Parameter


@dataclass(frozen=True)
class Optimizer:
    """Weight decay acts on matrices only."""

    betas: tuple[Share, Share]
    eps: Annotated[Rate, Field(gt=0.0)]
    weight_decay: Rate

    whole_matrices: ClassVar[bool] = False

    def group(self, parameter: Parameter) -> Group:
        decay = self.weight_decay if len(parameter.shape) > 1 else 0.0
        return Group({"weight_decay": decay}, ("exp_avg", "exp_avg_sq"))

    def open(self, groups: list[dict[str, Any]], on_whole: OnWhole | None) -> torch.optim.Optimizer:
        # A fused optimizer leaves a step out where `found_inf` is 1.
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, fused=True)

"""`distill`: cross-entropy of the text, and the divergence from the parent's predictions (knowledge distillation,
arXiv 1503.02531)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plrd_train.recover.objectives import Terms
from plrd_train.recover.objectives.ce import next_token_logits


@dataclass(frozen=True)
class Objective:
    """`ce` times the negative log-likelihood of the text, plus 1 - `ce` times temperature^2 KL(parent || model), both
    distributions being softmax(logits / `temperature`). At a temperature of 1 both are nats a token."""

    ce: float
    temperature: float

    def __post_init__(self) -> None:
        if not 0 <= self.ce < 1:
            raise ValueError(f"ce is {self.ce}: it must be at least 0 and below 1; objective=ce needs no teacher")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: it must be above 0")

    def open(self, teacher: Callable[[], nn.Module]) -> Terms:
        parent = teacher()

        def terms(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                wanted = F.log_softmax(next_token_logits(parent, input_ids) / self.temperature, -1)
            logits = next_token_logits(model, input_ids)
            ce = F.cross_entropy(logits, input_ids[:, 1:].flatten(), reduction="sum")
            made = F.log_softmax(logits / self.temperature, -1)
            kl = F.kl_div(made, wanted, reduction="sum", log_target=True) * self.temperature**2
            return {"ce": self.ce * ce, "kl": (1 - self.ce) * kl}

        return terms

"""`ce`: cross-entropy of the next token, PLRD as published."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from plrd_train.recover.objectives import Terms


@dataclass(frozen=True)
class Objective:
    """Negative log-likelihood of the text itself; has no settings."""

    def open(self, teacher: Callable[[], nn.Module]) -> Terms:
        return lambda model, input_ids: {"ce": cross_entropy(model, input_ids)}


def cross_entropy(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The negative log-likelihood of `input_ids` (n, seq_len), summed over the n * (seq_len - 1) predicted tokens."""
    return F.cross_entropy(next_token_logits(model, input_ids), input_ids[:, 1:].flatten(), reduction="sum")


def next_token_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The logits of each predicted token of `input_ids` (n, seq_len): (n * (seq_len - 1), vocabulary), float32."""
    return model(input_ids=input_ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)

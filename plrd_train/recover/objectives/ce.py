"""`ce`: cross-entropy of the next token, PLRD as published."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Objective:
    """Negative log-likelihood of the text itself; has no settings."""

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum")

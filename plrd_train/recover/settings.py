"""The settings of `recover` and `checkpoint`."""

from typing import Annotated

from pydantic import Field

from plrd_train.settings import Positive, Rate, section

# Learning rate times hidden size. Fitted on the small parents of docs/recipes.md; that it carries over as 1 / width (as
# in maximal update parametrization, arXiv 2203.03466) is untested at 7B.
RATE_TIMES_WIDTH = 0.1


@section
class Recover:
    """One stage of fine-tuning. `lr` is the highest learning rate; null: 0.1 / hidden size. `spike` and `patience` are
    those of `plrd_train.recover.guard`."""

    lr: Annotated[Rate, Field(gt=0.0)] | None
    clip: Annotated[Rate, Field(gt=0.0)]
    spike: Annotated[Rate, Field(gt=0.0)] | None
    patience: Positive
    global_batch_tokens: Positive
    micro_batch: Positive  # sequences that one rank takes through the model at once

    def peak_rate(self, hidden_size: int) -> float:
        """`lr`, or 0.1 / `hidden_size` if it is null."""
        return self.lr if self.lr is not None else RATE_TIMES_WIDTH / hidden_size


@section
class Checkpoint:
    """An unfinished stage is saved every `tokens` tokens or `minutes` minutes (null: not by that measure). The newest
    `keep` checkpoints are kept, and the ends of all stages."""

    tokens: Positive | None
    minutes: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None
    keep: Positive

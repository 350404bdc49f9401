"""The settings of `recover` and `checkpoint`."""

from typing import Annotated, Literal

from pydantic import Field

from plrd_train.settings import Positive, Rate, Share, section


@section
class Recover:
    """One stage of fine-tuning. `branch` is the share of a stage's tokens in which a branch of the trunk is annealed to
    become the member; at 0, trunk and member are one. `lr` null: 0.1 / hidden size. `spike` and `patience` are those of
    `plrd_train.recover.guard`."""

    lr: Annotated[Rate, Field(gt=0.0)] | None
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Share
    final: Share
    branch: Share
    betas: tuple[Share, Share]
    eps: Annotated[Rate, Field(gt=0.0)]
    weight_decay: Rate
    clip: Annotated[Rate, Field(gt=0.0)]
    spike: Annotated[Rate, Field(gt=0.0)] | None
    patience: Positive
    global_batch_tokens: Positive
    micro_batch: Positive  # sequences that one rank takes through the model at once


@section
class Checkpoint:
    """A stage that is under way is saved every so many tokens or minutes (null: not by that measure), and the newest
    `keep` checkpoints stay beside the ends of stages."""

    tokens: Positive | None
    minutes: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None
    keep: Positive

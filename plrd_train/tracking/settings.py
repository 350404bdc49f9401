"""The settings of `tracking`."""

from typing import Literal

from plrd_train.settings import section


@section
class Wandb:
    mode: Literal["offline", "online", "disabled"]
    project: str
    name: str | None


@section
class Tracking:
    wandb: Wandb

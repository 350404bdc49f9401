"""The learning rate of each step of a stage. One file a schedule, named as `schedule=NAME`; adding a file (and its YAML
in conf/schedule/) adds the schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from plrd_train.registry import Registry


@dataclass(frozen=True)
class Rates:
    """The learning rate of each step of a stage: first the steps of the trunk, then those of the branch that is trained
    from the end of the trunk and becomes the member. Without a branch, the trunk is the member."""

    trunk: tuple[float, ...]
    branch: tuple[float, ...] = ()


class Schedule(Protocol):
    """What each file here defines, as a frozen dataclass named `Schedule` whose fields are its own settings."""

    def rates(self, steps: int, peak: float) -> Rates:
        """The rates of `steps` >= 1 steps in all, the highest of them `peak`. They depend on nothing else: a restart
        computes them again."""
        ...


SCHEDULES = Registry("schedule", "recover.schedules", settings="Schedule")


def shaped(steps: int, peak: float, warmup: float, branch: float, shape: Callable[[float], float]) -> Rates:
    """Linear warmup over the share `warmup` of the trunk's steps, then `peak` times `shape` of the share of the
    remaining steps that are done (1 at the last one). The last `branch` share of all steps is a branch: its rate falls
    linearly from the trunk's last rate to the zero that would follow its own last step."""
    branch_steps = int(branch * steps)
    trunk_steps = steps - branch_steps
    warmup_steps = math.ceil(warmup * trunk_steps)

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        return peak * shape((step + 1 - warmup_steps) / max(1, trunk_steps - warmup_steps))

    trunk = tuple(rate(step) for step in range(trunk_steps))
    annealed = tuple(trunk[-1] * (branch_steps - step) / (branch_steps + 1) for step in range(branch_steps))
    return Rates(trunk, annealed)

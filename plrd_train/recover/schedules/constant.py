"""`constant`: the peak rate after the warmup."""

from dataclasses import dataclass

from plrd_train.recover.schedules import Rates, shaped
from plrd_train.settings import Share


@dataclass(frozen=True)
class Schedule:
    """`warmup` is a share of the trunk's steps, `branch` the share of a stage's steps that train
    a branch."""

    warmup: Share
    branch: Share

    def rates(self, steps: int, peak: float) -> Rates:
        return shaped(steps, peak, self.warmup, self.branch, lambda done: 1.0)

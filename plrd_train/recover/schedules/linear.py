"""`linear`: a straight line after the warmup, down to `final` times the peak at the last step."""

from dataclasses import dataclass

from plrd_train.recover.schedules import Rates, shaped
from plrd_train.settings import Share


@dataclass(frozen=True)
class Schedule:
    """`warmup` is a share of the trunk's steps, `final` the last rate over the peak, `branch` the share of a
    stage's steps that train a branch."""

    warmup: Share
    final: Share
    branch: Share

    def rates(self, steps: int, peak: float) -> Rates:
        return shaped(steps, peak, self.warmup, self.branch, lambda done: self.final + (1 - self.final) * (1 - done))

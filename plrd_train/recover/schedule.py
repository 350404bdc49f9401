"""The learning rate of each step of a stage."""

import math

from plrd_train.recover.settings import Recover

# Learning rate times hidden size. Fitted on the small parents of docs/recipes.md; that it carries over as 1 / width (as
# in maximal update parametrization, arXiv 2203.03466) is untested at 7B.
RATE_TIMES_WIDTH = 0.1


def peak_rate(settings: Recover, hidden_size: int) -> float:
    """`recover.lr`, or the rule that stands in its place where it is null."""
    return settings.lr if settings.lr is not None else RATE_TIMES_WIDTH / hidden_size


def rate(step: int, steps: int, peak: float, settings: Recover) -> float:
    """The learning rate of step 0 <= step < steps: linear warmup to `peak`, then constant or down to `final` * peak by
    a line or half a cosine."""
    warmup = math.ceil(settings.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    done = (step + 1 - warmup) / max(1, steps - warmup)  # the last step has the final rate
    share = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (settings.final + (1 - settings.final) * share)


def anneal(step: int, steps: int, start: float) -> float:
    """The learning rate of a branch: from `start`, where the trunk was, by a line to the zero that would follow its
    last step."""
    return start * (steps - step) / (steps + 1)

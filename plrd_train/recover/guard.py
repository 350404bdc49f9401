"""Protection against bad batches: a step whose loss is a spike or not finite is skipped, and too many such steps in a
row end the run."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from plrd_train.recover.settings import Recover
from plrd_train.runtime.world import SharedError

WINDOW = 64  # recent steps that the bound is computed from
LEAST = 16  # with fewer recent steps there is no bound
_SIGMA = 1.4826  # the standard deviation of normal numbers over their median absolute deviation
# Lower clamp on the deviation, as a share of the median: late in a stage losses differ less than good batches do.
_FLOOR = 0.01


@dataclass
class Judged:
    """The state of a guard: the number of skipped steps, in all and in a row up to now, and the recent (step, loss) of
    the others."""

    skipped: int = 0
    in_a_row: int = 0
    recent: list[tuple[int, float]] = field(default_factory=list)


class Guard:
    """Decides which steps of a stage are skipped, by their losses over all ranks, and alike on each rank.

    A step is skipped if its loss or gradient is not finite, or if its loss lies more than `spike` robust standard
    deviations above the median of the losses before it (Huber 1981, section 5.1; None: no bound). `patience` skipped
    steps in a row end the run.
    """

    def __init__(self, settings: Recover, say: Callable[[str], None], judged: Judged):
        """`judged` is the state from the checkpoint of a resumed stage."""
        self._spike, self._patience, self._say = settings.spike, settings.patience, say
        self.judged = dataclasses.replace(judged)

    def bound(self, step: int) -> float:
        """The largest loss that step `step` of the stage may have; infinity while too few losses are known.

        The loss of the step just before is ignored: it is known only if the run paused between the two, and a resumed
        run must not differ from an uninterrupted one.
        """
        losses = [loss for before, loss in self.judged.recent if before < step - 1][-WINDOW:]
        if self._spike is None or len(losses) < LEAST:
            return math.inf
        middle = median(losses)
        deviation = _SIGMA * median(abs(loss - middle) for loss in losses)
        return middle + self._spike * max(deviation, _FLOOR * abs(middle))

    def add(self, step: int, loss: float, norm: float, skipped: bool) -> None:
        """Record the outcome of a step. Raises SharedError after `patience` skipped steps in a row."""
        judged = self.judged
        if not skipped:
            judged.in_a_row = 0
            judged.recent = [*judged.recent[-WINDOW:], (step, loss)]
            return
        judged.skipped += 1
        judged.in_a_row += 1
        why = self._why(step, loss, norm)
        self._say(f"warning: step {step + 1} of this stage is left out: {why}")
        if judged.in_a_row >= self._patience:
            raise SharedError(
                f"recover.patience: {judged.in_a_row} steps in a row are left out, the last because {why}; the "
                "checkpoints of before stay, but the "
                "same command comes here again: lower recover.lr, or look at the text of these steps, and use "
                "another run_dir"
            )

    def _why(self, step: int, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        return (
            f"its gradient's norm is {norm}"
            if not math.isfinite(norm)
            else f"its loss of {loss:.4g} is beyond {self.bound(step):.4g}"
        )

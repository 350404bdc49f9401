"""Between steps: when to save a checkpoint, and when to stop."""

import enum
import time
from collections.abc import Callable

from plrd_train.recover.checkpoint import Checkpoints, Snapshot
from plrd_train.recover.progress import Progress
from plrd_train.recover.settings import Checkpoint
from plrd_train.runtime.stop import Stopped, StopRequest


class Wish(enum.IntEnum):
    """What a rank asks for after a step. The ranks follow the largest wish among them."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Pauses:
    """Checkpoints every so many tokens or minutes, and one more before a requested stop."""

    def __init__(
        self,
        settings: Checkpoint,
        request: StopRequest,
        checkpoints: Checkpoints,
        progress: Callable[[int, bool], Progress],
    ):
        """`progress(steps, in_branch)` returns the progress of the run after `steps` steps of the stage. A
        collective."""
        self._settings, self._request, self._checkpoints, self._progress = settings, request, checkpoints, progress
        self._tokens, self._since = 0, time.monotonic()

    def wish(self, tokens: int) -> Wish:
        """This rank's wish after one more step of `tokens` tokens. Not a collective."""
        self._tokens += tokens
        if self._request.asked():
            return Wish.STOP
        enough = self._settings.tokens is not None and self._tokens >= self._settings.tokens
        late = self._settings.minutes is not None and time.monotonic() - self._since >= 60 * self._settings.minutes
        if not (enough or late):
            return Wish.NOTHING
        self._tokens, self._since = 0, time.monotonic()
        return Wish.SAVE

    def take(self, wish: Wish, steps: int, trunk: Snapshot | None) -> None:
        """Save a checkpoint after `steps` steps of the stage. A collective. Raises Stopped if the ranks agreed to
        stop."""
        self._tokens, self._since = 0, time.monotonic()
        self._checkpoints.save_stage(self._progress(steps, trunk is not None), trunk)
        if wish is Wish.STOP:
            self._checkpoints.wait()
            raise Stopped(f"after {steps} steps of this stage")

"""A deadline for each step, so that a hang ends in minutes and not at the timeout of a collective."""

import time

from plrd_train.runtime.heartbeat import Heartbeat

FIRST_S = 1800.0  # a first step compiles, fills caches and fetches text
LEAST_S = 300.0  # exceeds the shard-read retry time
SLOWER = 20.0  # times the slowest step so far


class Deadline:
    """Sets the heartbeat's deadline for each step of a stage: half an hour for each of the first two; then 20 times the
    slowest so far, and at least five minutes. Between `rest` and the next `step` there is no deadline."""

    def __init__(self, heartbeat: Heartbeat):
        self._heartbeat = heartbeat
        self._began: float | None = None
        self._slowest: float | None = None

    def step(self) -> None:
        """A step begins."""
        now = time.monotonic()
        if self._began is not None:
            self._slowest = max(now - self._began, self._slowest or 0.0)
        self._began = now
        self._heartbeat.expect(FIRST_S if self._slowest is None else max(LEAST_S, SLOWER * self._slowest))

    def rest(self) -> None:
        """Something other than a step begins, such as a checkpoint."""
        self._began = None
        self._heartbeat.expect(None)

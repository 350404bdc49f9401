"""How soon the ranks of a run must have made their next step, so that a hang ends in minutes and not when a collective
gives up."""

import time

from plrd_train.runtime.heartbeat import Heartbeat

FIRST_S = 1800.0  # a first step compiles, fills caches and fetches text
LEAST_S = 300.0  # more than a shard that fails to read is tried for
SLOWER = 20.0  # than any step before


class Deadline:
    """Tells a heartbeat what to expect of the steps of a stage: half an hour for each of the first two; then 20 times
    what the slowest took, and at least five minutes. Between `rest` and the next `step` nothing is expected."""

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
        """Something else than a step begins."""
        self._began = None
        self._heartbeat.expect(None)

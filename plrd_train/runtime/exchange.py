"""Collectives that run beside the training loop, in a thread and over a process group of their own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from plrd_train.runtime.world import World

T = TypeVar("T")


class Exchange:
    """All ranks must make the same calls in the same order."""

    def __init__(self, world: World):
        """A collective."""
        self._world = world.beside()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="exchange")

    def share(self, value: Callable[[], T]) -> Future[list[T]]:
        """The small picklable `value()` of every rank, in rank order, on every rank. Computed and sent in the
        exchange's thread."""
        return self._thread.submit(lambda: self._world.share(value()))

    def run(self, collective: Callable[[World], T]) -> Future[T]:
        """Run a collective in the exchange's thread, over its group."""
        return self._thread.submit(lambda: collective(self._world))

    def close(self) -> None:
        """End the thread, without waiting for ranks that may be gone."""
        self._thread.shutdown(wait=False, cancel_futures=True)

"""Side by side, in one run: ours against what one would use otherwise. One file a question; each has `rows()`.

`make bench` runs them all, prints a table and writes results.json; `python -m benchmarks factorize` runs one. What
loses stays in the table.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """`ours` against `other`, both in `unit`; `ratio` says how many times better ours is."""

    name: str
    ours: float
    other: float
    unit: str
    shape: str
    device: str = field(default_factory=lambda: device_name())
    more_is_better: bool = False

    @property
    def ratio(self) -> float:
        return self.ours / self.other if self.more_is_better else self.other / self.ours

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["more_is_better"]
        return {**fields, "ratio": self.ratio}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if device().type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def seconds(works: Sequence[Callable[[], Any]], repeats: int = 5) -> list[float]:
    """The shortest time of each of `works`, which take turns, so that what else the machine does meets them alike."""
    times = [[] for _ in works]
    for work in works:
        work()  # what is done once is not counted
    for _ in range(repeats):
        for work, taken in zip(works, times, strict=True):
            _wait()
            start = time.perf_counter()
            work()
            _wait()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()

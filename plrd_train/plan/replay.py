"""The peak of a step: what a model's own run holds (its trace) with what an engine holds beside it at each moment."""

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from plrd_train.plan.trace import Event
from plrd_train.structure import Parts, add, total


class Holder(Protocol):
    """An engine during a forward and backward: what it holds changes with the events of a trace."""

    def held(self) -> Parts:
        """The bytes that it holds now."""
        ...

    def on(self, event: Event) -> Iterable[Parts]:
        """Take part in `event`: gather, free, reduce. Yields what it holds in between, where that is more than before
        and after."""
        ...


def peak(events: Sequence[Event], holder: Holder) -> tuple[Parts, str]:
    """What is held at the highest moment, the parts of `holder` and "activations", and when that is."""
    best: tuple[Parts, str] = {}, ""
    before: Event | None = None
    for event in events:
        moments = [add(holder.held(), {"activations": event.peak})]
        moments += [add(held, {"activations": event.live}) for held in holder.on(event)]
        highest = max(moments, key=total)
        if total(highest) > total(best[0]):
            best = highest, _when(before, event)
        before = event
    return best


def _when(before: Event | None, event: Event) -> str:
    """In words, between these two: down to the block, where the module lies in one."""
    if before is None or (before.kind == "forwarded" and before.name == ""):
        return "in the loss" if before else "at the beginning"
    module = event.name.rpartition(".")[0] if event.kind == "gradient" else event.name
    block = re.match(r".*?\.\d+(?=\.|$)", module)
    return (
        f"in the {'forward' if event.kind.startswith('forward') else 'backward'} of "
        f"{block[0] if block else module or 'the model'}"
    )

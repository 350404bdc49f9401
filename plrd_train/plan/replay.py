"""The peak memory of a step: the activations of a trace plus the memory of an engine, at each event."""

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from plrd_train.plan.trace import Event
from plrd_train.structure import Parts, add, total


class Holder(Protocol):
    """The memory of an engine during a forward and backward; it changes with the events of a trace."""

    def held(self) -> Parts:
        """Bytes held now, by part."""
        ...

    def on(self, event: Event) -> Iterable[Parts]:
        """Apply `event`: gather, free or reduce. Yields intermediate peaks, which exceed the bytes before and after."""
        ...


def peak(events: Sequence[Event], holder: Holder) -> tuple[Parts, str]:
    """(bytes by part, moment) of the peak. The parts are those of `holder` and "activations"."""
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
    """The moment between two events, in words; it names the block of the module, if any."""
    if before is None or (before.kind == "forwarded" and before.name == ""):
        return "in the loss" if before else "at the beginning"
    module = event.name.rpartition(".")[0] if event.kind == "gradient" else event.name
    block = re.match(r".*?\.\d+(?=\.|$)", module)
    return (
        f"in the {'forward' if event.kind.startswith('forward') else 'backward'} of "
        f"{block[0] if block else module or 'the model'}"
    )

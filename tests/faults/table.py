"""What a campaign met, in tables."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from faults.kinds import DECK, PHASES, READING, Fault


@dataclass(frozen=True)
class Met:
    """A fault that ended a start: where in the campaign, what was said, the newest whole checkpoint then left to go on
    from (-1: none yet), by its optimizer steps, and the steps begun before."""

    family: int
    number: int
    setting: str
    fault: Fault
    statuses: list[int]
    said: str
    damaged: str
    went_on_from: int
    begun: int
    seconds: float


def table(met: Sequence[Met]) -> str:
    """Kinds by phases, as markdown: how many, and from which steps on the next starts went on; and below, what was
    said."""
    phases = [*PHASES, READING]
    lines = ["| fault | " + " | ".join(phases) + " | all | went on from |", "|---" * (len(phases) + 3) + "|"]
    said: dict[str, Counter[str]] = {}
    for kind in dict.fromkeys(kind for kind, _ in DECK):
        those = [one for one in met if one.fault.kind == kind]
        counts = Counter(one.fault.phase for one in those)
        cells = [str(counts[phase] or "") for phase in phases]
        lines.append(f"| {kind} | {' | '.join(cells)} | {len(those)} | {_origins(those)} |")
        said[kind] = Counter(_words(one) for one in those)
    lines.append("")
    lines += ["| fault | what was said at the end, or damaged | times |", "|---|---|---|"]
    lines += [f"| {kind} | {text} | {times} |" for kind, words in said.items() for text, times in words.most_common()]
    return "\n".join(lines) + "\n"


def _words(one: Met) -> str:
    text = re.sub(r"(?<=RUN_DIR)/[^:( ]*", "/…", one.said).replace("\n", "<br>") or "nothing"
    if one.damaged:
        text = re.sub(
            r"step-\d+",
            "step-N",
            re.sub(r"shard-\d+-[^,]*(?=\.safe)", "shard-N", re.sub(r"(?<=factors/).*(?=\.safe)", "…", one.damaged)),
        )
    return text


def _origins(those: Sequence[Met]) -> str:
    steps = [one.went_on_from for one in those if one.went_on_from >= 0]
    parts = [f"{len(steps)} a checkpoint (step {min(steps)} to {max(steps)})"] if steps else []
    if fresh := len(those) - len(steps):
        parts.append(f"{fresh} the start, before the first checkpoint")
    return "; ".join(parts)


def as_json(met: Sequence[Met]) -> list[dict]:
    return [dataclasses.asdict(one) for one in met]

"""Signs of a bad compression in a run's numbers: a loss that jumps, a plateau early in a stage, and convergence that
slows from stage to stage.

The bounds are chosen by eye. A member can be good in spite of a sign.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from plrd_train.family import Member, ParentRecord
from plrd_train.tracking.rows import Row

JUMP = 1.0  # nats by which factoring may raise the held-out loss; above, training starts from little more than noise
PARTS = 16  # of a stage, whose median losses are compared
FLAT = 0.02  # of the fall of a stage's loss, which its second half must exceed
FAR = 0.1  # nats above the parent at which a flat loss is no success
SLOWER = 2.0  # times the tokens for half of the fall, from the first to the last of three stages


@dataclass(frozen=True)
class Sign:
    """`words` about the stage of this number, from 1."""

    stage: int
    words: str


def signs(parent: ParentRecord, members: Sequence[Member], rows: Sequence[Row]) -> list[Sign]:
    """The signs in a family, stage by stage; `rows` are those of metrics.jsonl."""
    nats = [_loss(parent.ppl), *(_loss(member.ppl) for member in members)]
    losses = [_stage(rows, stage) for stage in range(1, len(members) + 1)]
    found = []
    for stage, member in enumerate(members, 1):
        own = (
            _jump(member, nats[stage - 1]),
            _plateau(losses[stage - 1], nats[stage] - nats[0]),
            _slower(losses[max(0, stage - 3) : stage]),
        )
        found += [Sign(stage, f"stage {stage} ({member.name}): {words}") for words in own if words]
    return found


def _loss(perplexity: float | None) -> float:
    """Nats a token; NaN where it was not measured."""
    return math.log(perplexity) if perplexity else math.nan


@dataclass(frozen=True)
class _Stage:
    """The median losses of PARTS equal parts of a stage, and the tokens of one part."""

    losses: Sequence[float]
    tokens: float

    @property
    def fall(self) -> float:
        return self.losses[0] - min(self.losses)

    @property
    def half(self) -> float:
        """The tokens after which half of the fall was made."""
        return self.tokens * next(i for i, loss in enumerate(self.losses, 1) if loss <= self.losses[0] - self.fall / 2)


def _stage(rows: Sequence[Row], stage: int) -> _Stage | None:
    """None where it was too short to tell, or where its loss never fell."""
    own = [row for row in rows if row.get("stage/index") == stage and row.get("train/loss") is not None]
    if len(own) < 4 * PARTS:
        return None
    edges = [len(own) * i // PARTS for i in range(PARTS + 1)]
    losses = [median(row["train/loss"] for row in own[start:stop]) for start, stop in pairwise(edges)]
    made = _Stage(losses, (own[-1]["tokens/total"] - own[0]["tokens/total"]) / (len(own) - 1) * len(own) / PARTS)
    return made if made.fall > 0 else None


def _jump(member: Member, before: float) -> str | None:
    after = _loss(member.ppl_factored)
    if not after - before > JUMP:
        return None
    return (
        f"factoring raised the held-out loss from {before:.2f} to {after:.2f}; a factorizer that looks at text "
        "(whitened, refined) or smaller steps "
        "of the ratio start closer to the model before"
    )


def _plateau(losses: _Stage | None, above: float) -> str | None:
    if losses is None or not above > FAR:
        return None
    first, second = min(losses.losses[: PARTS // 2]), min(losses.losses[PARTS // 2 :])
    if first - second > FLAT * losses.fall:
        return None
    return (
        f"the training loss lies flat at {first:.3g} since half of the stage's tokens, and the member is {above:.2f} "
        "above the parent; more tokens "
        "alone will not close that: try a higher recover.lr, or a smaller step of the ratio"
    )


def _slower(last: Sequence[_Stage | None]) -> str | None:
    halves = [losses.half for losses in last if losses is not None]
    if (
        len(halves) < 3
        or any(later <= earlier for earlier, later in pairwise(halves))
        or halves[-1] < SLOWER * halves[0]
    ):
        return None
    return (
        "convergence is slower with each stage: half of the fall of the loss took "
        f"{', '.join(f'{half:,.0f}' for half in halves)} tokens in the last "
        "three; give later stages more of the budget (stages.growth), or take more and smaller steps"
    )

"""What may happen to a start of a job: the kinds of faults, the phases in which they strike, and how a start that met
one must end."""

import random
import socket
from dataclasses import dataclass
from pathlib import Path

from faults.starting import Start
from faults.striking import WAITS_S

HOST = socket.gethostname()
_LOOP, _CHECKPOINT, _MEMBERS = (
    "plrd_train.recover.loop",
    "plrd_train.recover.checkpoint",
    "plrd_train.publish.members",
)


@dataclass(frozen=True)
class Point:
    """Before one of the first `calls` calls of a function, "module:name" or "module:Class.name"; on rank 0 alone where
    others do not call it."""

    where: str
    calls: int
    main_only: bool = False


PHASES = {
    "restart": (
        Point("plrd_train.pipeline:resume", 1),
        Point(f"{_CHECKPOINT}:Checkpoints.latest", 1),
        Point("plrd_train.recover.saved:read", 3),
    ),
    "factoring": (
        Point("plrd_train.stages.compress:factor", 1),
        Point("plrd_train.compress.factor_cache:FactorCache.get", 5),
        Point("plrd_train.compress.factor_cache:FactorCache.put", 5),
    ),
    "step": (Point(f"{_LOOP}:Trainer._step", 8), Point(f"{_LOOP}:Trainer._micro_batch", 8)),
    # The last three of the nine steps of a stage are those of its branch.
    "annealing": (Point(f"{_LOOP}:Trainer._step", 9),),
    "checkpoint": (
        Point("plrd_train.recover.saved:write", 4),
        Point(f"{_CHECKPOINT}:write_atomically", 6, True),
        Point(f"{_CHECKPOINT}:Checkpoints._make_visible", 4, True),
    ),
    "evaluation": (
        Point("plrd_train.stages.evaluate:_perplexity", 2),
        Point("plrd_train.stages.evaluate:perplexity", 2),
    ),
    "publishing": (
        Point("plrd_train.pipeline:publish", 1),
        Point(f"{_MEMBERS}:write_member", 1, True),
        Point(f"{_MEMBERS}:_ShardWriter.close", 1, True),
        Point(f"{_MEMBERS}:MemberWriter.commit", 1, True),
        Point("plrd_train.family:Family.write", 2, True),
        Point("plrd_train.stages.publish:write_report", 1, True),
    ),
}
READING = "reading"  # a phase of its own: before a training shard is opened
SHARD_KINDS = ("a shard disappears", "a shard cannot be read")
DAMAGES = ("a flipped byte", "a truncated file")
LAUNCHER = "kill -9 of the launcher"
WANDB = "W&B unreachable, then SIGTERM"
_EVERYWHERE = ("kill -9 of a rank", "kill -9 of all ranks", "SIGTERM", "no room", "a read-only folder", *DAMAGES)

# Every kind in every phase where it makes sense: the deck that a campaign draws from.
DECK = [
    *((kind, phase) for kind in _EVERYWHERE for phase in PHASES),
    *((kind, READING) for kind in SHARD_KINDS for _ in range(3)),
    *((LAUNCHER, phase) for phase in ("factoring", "step", "checkpoint", "publishing")),
    *((WANDB, "step") for _ in range(2)),
]


@dataclass(frozen=True)
class Fault:
    """`kind` strikes in rank `rank`, `delay` seconds after the moment before the `call`-th call, from 0, of `where` (of
    the opening of a shard, in the phase "reading"). `seed` draws what is chosen when it strikes: a folder, a file, a
    byte."""

    kind: str
    phase: str
    where: str
    call: int
    rank: int
    delay: float
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.kind}, {self.phase}: {self.delay:.2f} s after call {self.call} of {self.where or 'open'} in "
            f"rank {self.rank}"
        )


def draw(kind: str, phase: str, world_size: int, dice: random.Random) -> Fault:
    """A fault of this kind and phase: half of them at a call, half at a random moment after it."""
    rank = dice.randrange(world_size)
    seed = dice.getrandbits(32)
    if phase == READING:
        return Fault(kind, phase, "", dice.randrange(6), rank, 0.0, seed)
    point = dice.choice(PHASES[phase])
    if kind == WANDB:
        point = PHASES["step"][0]
    call = dice.randrange(2 if kind == WANDB else 0, point.calls)
    delay = dice.choice((0.0, dice.uniform(0, 0.3)))
    return Fault(kind, phase, point.where, call, 0 if point.main_only else rank, delay, seed)


def complaint(fault: Fault, start: Start, run_dir: Path) -> str | None:
    """What is wrong with the way in which a start ended that met `fault`; None: nothing."""
    if start.hung:
        return "hung"
    size, kind = len(start.pids), fault.kind
    errors = [
        line for line in start.err.splitlines() if not line.startswith("wandb: ") and "; trying again in " not in line
    ]
    if kind == LAUNCHER:
        return _unless(start.statuses == [-9] and not errors, start)
    if kind == "kill -9 of all ranks":
        return _unless(start.statuses == [-9] * size and len(errors) <= 1, start)
    if kind == "kill -9 of a rank" or kind in DAMAGES:
        told = f"error: rank {fault.rank} ({HOST}, pid {start.pids[fault.rank]}) died without a word"
        named = len(errors) == 1 and errors[0].startswith(told) if size > 1 else not errors
        return _unless(start.statuses == [-9 if rank == fault.rank else 1 for rank in range(size)] and named, start)
    if kind in ("SIGTERM", WANDB):
        warnings = start.out.count("warning: W&B is off")
        asked = bool(start.out) and "stopped as asked" in start.out.splitlines()[-1]
        return _unless(start.statuses == [75] * size and not errors and asked and warnings == (kind == WANDB), start)
    place = start.shard if kind in SHARD_KINDS else str(run_dir)
    if start.err.count("; trying again in ") != (len(WAITS_S) if kind in SHARD_KINDS else 0):
        return f"tried again another number of times:\n{start.err}"
    why = "Permission denied" if kind == "a read-only folder" else ""
    named = len(errors) == 1 and errors[0].startswith("error: ") and place in errors[0] and why in errors[0]
    return _unless(start.statuses == [2] * size and named, start)


def _unless(well: bool, start: Start) -> str | None:
    return None if well else f"ended with {start.statuses}:\n{start.out[-600:]}\n{start.err[-3000:]}"

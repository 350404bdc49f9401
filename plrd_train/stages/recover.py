"""The trunk is trained on the stage's token budget."""

import dataclasses
import time

from plrd_train.engine import Engine, open_engine
from plrd_train.parents.weights import WeightReader
from plrd_train.recover.checkpoint import Snapshot
from plrd_train.recover.guard import Guard
from plrd_train.recover.loop import Recovered
from plrd_train.recover.pauses import Pauses
from plrd_train.recover.progress import Progress, UnderWay
from plrd_train.run import Run, Stage
from plrd_train.tracking import console
from plrd_train.training import Budget, Job, train


def recover(
    run: Run, stage: Stage, progress: Progress, under_way: UnderWay, trunk: Snapshot | None
) -> tuple[Recovered, float]:
    """Train the trunk in the engine on the rest of the stage's budget; `trunk` is given where the engine holds its
    branch. Returns with the result the seconds of training, those of earlier starts included. Raises Stopped if a stop
    is asked for."""
    peak = run.config.recover.peak_rate(run.parent_config.get_text_config().hidden_size)
    guard = Guard(run.config.recover, console.say, under_way.judged)
    start = time.perf_counter() - under_way.seconds

    def progress_after(steps: int, in_branch: bool) -> Progress:
        judged = dataclasses.replace(guard.judged)
        now = dataclasses.replace(
            under_way, steps=steps, seconds=time.perf_counter() - start, in_branch=in_branch, judged=judged
        )
        return dataclasses.replace(progress, counters=run.counters.now(), position=run.position(), under_way=now)

    job = Job(run.config, run.engine, run.parent_config, run.loader, run.counters, run.tracker, lambda: _teacher(run))
    metrics = {"stage/index": stage.index, "stage/ratio": stage.ratio}
    budget = Budget(f"stage {stage.index}: recover at {stage.ratio:g}x", stage.tokens, peak, metrics)
    pauses = Pauses(run.config.checkpoint, run.request, run.checkpoints, progress_after)
    recovered = train(job, budget, guard, pauses, under_way.steps, trunk)
    return recovered, time.perf_counter() - start


def _teacher(run: Run) -> Engine:
    """An engine of the same kind with the parent, frozen."""
    engine = open_engine(run.config.engine.name, run.config.engine.settings, run.world)
    engine.load(run.architecture(None), WeightReader(run.parent))
    engine.model.requires_grad_(False).eval()
    return engine

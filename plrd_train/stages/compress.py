"""A trunk becomes a smaller one: the ranks of the stage's ratio, and the factors of these ranks."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from torch import Tensor

from plrd_train.compress.compressor import Ranks, Source
from plrd_train.compress.contracts import AllocationError, Decomposed, DecompositionError
from plrd_train.compress.ranks import Shape, ratio_of
from plrd_train.family import Member
from plrd_train.recover.progress import Progress, UnderWay
from plrd_train.run import Run, Stage
from plrd_train.runtime.world import SharedError
from plrd_train.stages.evaluate import evaluate_factored
from plrd_train.tracking import console
from plrd_train.training import calibration_text


def compress(run: Run, stage: Stage, progress: Progress) -> UnderWay:
    """Factor the trunk in the engine to the ranks of `stage`. Returns the stage as it begins to train."""
    start = time.perf_counter()
    shapes = run.shapes()
    wanted, factors = factor(run, stage, progress, shapes)
    ranks = {**progress.ranks, **wanted}
    run.engine.rebuild(run.architecture(ranks), factors)
    del factors  # the engine holds them now
    seconds = {"factor": time.perf_counter() - start}
    member = Member(
        name=stage.name,
        ratio_requested=stage.ratio,
        ratio=ratio_of(shapes, wanted),
        params=run.engine.params()
        - sum(shape.pair_params(wanted.get(name)) - shape.params(wanted.get(name)) for name, shape in shapes.items()),
        linear_params=sum(shape.params(wanted.get(name)) for name, shape in shapes.items()),
        form=run.config.form.name,
        ranks=wanted,
        path=f"members/{stage.name}",
        made_from=progress.entry.name if progress.entry else "parent",
        engine=run.config.engine.name,
        world_size=run.world.size,
        seconds=seconds,
        eval_factored=evaluate_factored(run, stage),
    )
    return UnderWay(member, ranks)


def factor(
    run: Run, stage: Stage, progress: Progress, shapes: Mapping[str, Shape]
) -> tuple[Ranks, dict[str, Decomposed]]:
    """The rank of each Linear of the trunk that is low-rank at the ratio of `stage`, and the factors of those whose
    rank changes. Raises SharedError where a weight cannot be factored."""
    source, factors = _source(run, stage, progress), dict[str, Decomposed]()
    try:
        with console.progress(f"stage {stage.index}: factor to {stage.ratio:g}x", len(shapes), "weights") as bar:
            allocated = run.compressor.allocate(source, shapes, [stage.ratio])
            for _, made in run.compressor.factors(source, shapes, allocated):
                factors[made.name] = made
                bar.update(1, error=made.rel_error)
                _record(run, stage, made)
    except DecompositionError as error:
        raise SharedError(f"{run.config.parent.path}: {error}") from None
    except AllocationError as error:
        raise SharedError(str(error)) from None
    return allocated.ranks[0], factors


def _record(run: Run, stage: Stage, made: Decomposed) -> None:
    event: dict[str, float | str] = {"stage/index": stage.index, "linear": made.name, "rank": made.rank}
    run.tracker.log_event("factor", event | {"factor/rel_error": made.rel_error, "factor/seconds": made.seconds})


def _source(run: Run, stage: Stage, progress: Progress) -> Source:
    """The model in the engine, for the compressor."""

    @contextmanager
    def shown(title: str, total: int) -> Iterator[Callable[[], object]]:
        with console.progress(f"stage {stage.index}: {title}", total, "weights") as bar:
            yield lambda: bar.update(1)

    @cache  # a stage reads its calibration text once
    def text(tokens: int) -> list[Tensor]:
        return _text(run, stage, tokens)

    in_float32 = dataclasses.replace(run.architecture(progress.ranks), attention=None)
    return Source(run.engine, in_float32, text, run.kept, shown)


def _text(run: Run, stage: Stage, tokens: int) -> list[Tensor]:
    """This rank's part of that much calibration text. A collective."""
    world = run.world
    batches = world.on_all(
        lambda: calibration_text(run.config, run.train, run.tokenizer, tokens, world.rank, world.size)
    )
    read = sum(world.share(sum(batch.numel() for batch in batches)))
    run.tracker.log_event("calibration", {"stage/index": stage.index, "calibration/tokens": read})
    return batches

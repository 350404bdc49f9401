"""The first step of a stage: the ranks that its ratio leads to, and the factors of these ranks."""

from collections.abc import Mapping

from plrd_train.compress.compressor import Ranks
from plrd_train.compress.contracts import Decomposed
from plrd_train.compress.ranks import Shape
from plrd_train.recover.progress import Progress
from plrd_train.run import Run, Stage


def factor(
    run: Run, stage: Stage, progress: Progress, shapes: Mapping[str, Shape]
) -> tuple[Ranks, dict[str, Decomposed]]:
    """The rank of each Linear of the trunk in the engine that is low-rank at the ratio of `stage`, and the factors of
    those whose rank changes. A collective; raises SharedError where a weight cannot be factored."""
    source, factors = run.source(stage, progress), dict[str, Decomposed]()
    with run.factoring(stage, shapes) as on_done:
        allocated = run.compressor.allocate(source, shapes, [stage.ratio])
        for _, made in run.compressor.factors(source, shapes, allocated):
            factors[made.name] = made
            on_done(made)
    return allocated.ranks[0], factors

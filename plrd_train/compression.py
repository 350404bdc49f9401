"""The first step of a stage: the ranks that its ratio leads to, and the factors of these ranks, by the method and the allocation of the run."""

from collections.abc import Mapping

from plrd_train.lowrank.distributed import Decomposed, Spectra, changes, decompose
from plrd_train.lowrank.ranks import SPECTRAL, Shape
from plrd_train.recover.progress import Progress
from plrd_train.run import Run, Stage


def factor(run: Run, stage: Stage, progress: Progress, shapes: Mapping[str, Shape]) -> tuple[dict[str, int], dict[str, Decomposed]]:
    """The rank of each Linear of the trunk in the engine that is low-rank at the ratio of `stage`, and the factors of those whose rank changes. A
    collective; raises SharedError where a weight cannot be factored.

    Where the ranks depend on the spectra, these are those of the trunk as it stands, by the method's own metric; a method that factors in order
    takes the ranks alone from them.
    """
    factorizer, kept = run.config.factorizer.settings, run.kept
    with run.factoring(stage, shapes) as on_done:
        spectra = None
        if run.config.ranks.name in SPECTRAL:
            spectra = Spectra(run.engine, shapes, factorizer, kept)
            for part, statistics in run.calibrated(stage, shapes, shapes):
                spectra.add(part, statistics)
        wanted = run.ranks(stage, shapes, spectra)
        todo = changes(shapes, wanted)
        if spectra and not factorizer.sequential:
            return wanted, spectra.cut(todo, on_done)
        del spectra  # which holds all that was decomposed
        factors: dict[str, Decomposed] = {}
        if factorizer.sequential:
            for made in factorizer.in_order(run.engine, lambda: run.blocks(stage, progress), shapes, todo, kept):
                factors[made.name] = made
                on_done(made)
        else:
            for part, statistics in run.calibrated(stage, shapes, todo):
                factors |= decompose(run.engine, shapes, {name: todo[name] for name in part}, factorizer, on_done, statistics, kept)
        return wanted, factors

"""What a run goes on from: the parent; or the last checkpoint of one that was stopped."""

from plrd_train.family import Family, ParentRecord
from plrd_train.parents.modeling_plrd import model_ranks
from plrd_train.parents.weights import WeightReader
from plrd_train.recover.checkpoint import Snapshot
from plrd_train.recover.progress import Progress
from plrd_train.report.page import write_report
from plrd_train.run import Run
from plrd_train.runtime.world import SharedError
from plrd_train.stages.evaluate import evaluate


def resume(run: Run) -> tuple[Progress, Snapshot | None]:
    """Put the parent into the engine; or, of a run that was stopped, its last trunk, the stage that was under way, or
    the member that was still to be published. Returns how far the run is and, where the engine holds the branch of a
    stage, its trunk. Raises SharedError where family.json is lost."""
    progress = run.checkpoints.latest()
    if progress is None:
        return _begin(run), None
    if run.found is None:
        raise SharedError(
            f"{run.run_dir / 'family.json'}: lost, though checkpoints/ holds this run; restore it, or use "
            "another run_dir"
        )
    published = progress.entry is None or run.family.has(progress.entry.name)
    trunk = None
    if progress.under_way is not None:
        architecture = run.architecture(progress.under_way.ranks)
        trunk = run.checkpoints.load_stage(progress, architecture, run.config.optimizer.settings)
    else:
        run.checkpoints.load(progress, run.architecture(progress.ranks), member=not published)
    if progress.position is not None:
        position = progress.position
        run.world.on_all(lambda: run.loader.seek(position))
    if progress.stages < len(run.stages):
        run.world.on_all(run.loader.check)
    run.counters = progress.counters.now()
    run.tracker.rewind(run.counters.steps)
    if published and run.world.is_main:
        write_report(run.run_dir)  # the run may have been stopped just before it
    return progress, trunk


def _begin(run: Run) -> Progress:
    run.world.on_all(run.loader.check)
    run.engine.load(run.architecture(None), WeightReader(run.parent))
    run.tracker.rewind(0)
    if run.found is None:
        record = ParentRecord(
            path=run.config.parent.path,
            revision=run.parent.revision,
            params=run.engine.params(),
            eval=evaluate(run, "of the parent"),
        )
        run.found = Family(run.run_dir, record)
        run.world.on_main(run.family.write)
    return Progress(ranks=model_ranks(run.parent_config))

"""Progressive Low-Rank Decomposition (arXiv 2406.19995): one parent becomes a family.

For each stage: compress -> recover -> evaluate -> publish. The trunk is the model that goes on from stage to stage;
what a stage publishes of it is a member. The first stage factors the parent's dense Linears; each later one lowers the
rank of the fine-tuned factors A·B by the best lower-rank pair of their product, so that a Linear always stays two
factors and the depth never grows.
"""

import time

from plrd_train.family import Family
from plrd_train.recover.checkpoint import Snapshot
from plrd_train.recover.progress import Progress
from plrd_train.run import Run, Stage
from plrd_train.stages.compress import compress
from plrd_train.stages.evaluate import evaluate
from plrd_train.stages.publish import publish
from plrd_train.stages.recover import recover
from plrd_train.stages.resume import resume


def make_family(run: Run) -> Family:
    """Make every member that `run` asks for and that is not there yet, from where the run was stopped."""
    progress, trunk = resume(run)
    if progress.entry and not run.family.has(progress.entry.name):
        evaluate_and_publish(run, progress)  # stopped between the end of its training and here
        run.load_trunk(progress)
    for stage in run.stages[progress.stages :]:
        progress, trunk = make_member(run, stage, progress, trunk), None
    return run.family


def make_member(run: Run, stage: Stage, progress: Progress, trunk: Snapshot | None) -> Progress:
    """One stage: the trunk in the engine becomes the next, smaller trunk, and a member of it is published. `trunk` is
    given where the stage goes on in its branch, which then is in the engine."""
    run.stop_if_asked(f"before stage {stage.index}")
    under_way = progress.under_way or compress(run, stage, progress)
    recovered, seconds = recover(run, stage, progress, under_way, trunk)
    spent = recovered.trunk_tokens + recovered.branch_tokens
    factored = under_way.entry
    assert factored is not None
    trained = {
        "tokens_stage": spent,
        "tokens_total": run.counters.tokens_total,
        "tokens_lineage": progress.tokens_lineage + spent,
        "seconds": {**factored.seconds, "recover": seconds},
    }
    progress = Progress(
        stages=stage.index,
        counters=run.counters.now(),
        position=run.position(),
        tokens_lineage=progress.tokens_lineage + recovered.trunk_tokens,
        ranks=under_way.ranks,
        entry=factored.model_copy(update=trained),
        branched=recovered.member is not None,
    )
    trunk = run.engine.snapshot()
    run.checkpoints.save(progress, trunk, recovered.member)
    if recovered.member is not None:
        run.engine.restore(recovered.member)
    evaluate_and_publish(run, progress)
    if recovered.member is not None:
        run.engine.restore(trunk)
    return progress


def evaluate_and_publish(run: Run, progress: Progress) -> None:
    """Measure the member in the engine with its weights as published, write its folder, and list it in family.json."""
    member = progress.entry
    assert member is not None
    run.stop_if_asked(f"before member {member.name} is published")
    start = time.perf_counter()
    scores = evaluate(run, "after recovery", run.stages[progress.stages - 1])
    seconds = {**member.seconds, "evaluate": time.perf_counter() - start}
    run.checkpoints.wait()  # from here on a restart trains no more
    publish(run, member.model_copy(update={"eval": scores, "seconds": seconds}), progress.ranks)

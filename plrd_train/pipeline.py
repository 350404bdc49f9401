"""Progressive Low-Rank Decomposition (arXiv 2406.19995): one parent becomes a family.

For each stage: compress -> recover -> evaluate -> publish. The trunk is the model that goes on from stage to stage;
what a stage publishes of it is a member. The first stage factors the parent's dense Linears; each later one lowers the
rank of the fine-tuned factors A·B by the best lower-rank pair of their product, so that a Linear always stays two
factors and the depth never grows.
"""

import time

from plrd_train.compress.ranks import ratio_of
from plrd_train.compression import factor
from plrd_train.family import Family, Member
from plrd_train.recover.progress import Progress, UnderWay
from plrd_train.run import Run, Stage


def make_family(run: Run) -> Family:
    """Make every member that `run` asks for and that is not there yet, going on from where it was stopped."""
    progress = run.resume()
    if progress.entry and not run.family.has(progress.entry.name):
        publish(run, progress)  # stopped between the end of its training and here
        run.load_trunk(progress)
    for stage in run.stages[progress.stages :]:
        progress = make_member(run, stage, progress)
    return run.family


def make_member(run: Run, stage: Stage, progress: Progress) -> Progress:
    """One stage: the trunk in the engine becomes the next, smaller trunk, and a member of it is published."""
    run.stop_if_asked(f"before stage {stage.index}")
    under_way = progress.under_way or compress(run, stage, progress)
    recovered, seconds = run.recover(stage, progress, under_way)
    spent = recovered.trunk_tokens + recovered.branch_tokens
    assert under_way.entry is not None
    entry = under_way.entry.model_copy(
        update={
            "tokens_stage": spent,
            "tokens_total": run.counters.tokens_total,
            "tokens_lineage": progress.tokens_lineage + spent,
            "seconds": {**under_way.entry.seconds, "recover": seconds},
        }
    )
    progress = Progress(
        stages=stage.index,
        counters=run.counters.now(),
        position=run.position(),
        tokens_lineage=progress.tokens_lineage + recovered.trunk_tokens,
        ranks=under_way.ranks,
        entry=entry,
        branched=recovered.member is not None,
    )
    trunk = run.engine.snapshot()
    run.checkpoints.save(progress, trunk, recovered.member)
    if recovered.member is not None:
        run.engine.restore(recovered.member)
    publish(run, progress)
    if recovered.member is not None:
        run.engine.restore(trunk)
    return progress


def compress(run: Run, stage: Stage, progress: Progress) -> UnderWay:
    """Factor the trunk in the engine to the ranks of `stage`. Returns the stage as it begins to train."""
    start = time.perf_counter()
    shapes = run.shapes()
    wanted, factors = factor(run, stage, progress, shapes)
    ranks = {**progress.ranks, **wanted}
    run.engine.rebuild(run.architecture(ranks), factors)
    del factors  # which the engine holds now
    seconds = {"factor": time.perf_counter() - start}
    entry = Member(
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
        eval_factored=run.evaluate("straight after factoring", stage),
    )
    return UnderWay(entry, ranks)


def publish(run: Run, progress: Progress) -> None:
    """Evaluate the member in the engine on its weights as published, write its folder, and list it in family.json."""
    entry = progress.entry
    assert entry is not None
    run.stop_if_asked(f"before member {entry.name} is published")
    start = time.perf_counter()
    scores = run.evaluate("after recovery", run.stages[progress.stages - 1])
    seconds = {**entry.seconds, "evaluate": time.perf_counter() - start}
    run.checkpoints.wait()  # from here on a restart trains no more
    run.publish(entry.model_copy(update={"eval": scores, "seconds": seconds}), progress.ranks)

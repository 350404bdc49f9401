"""Progressive Low-Rank Decomposition (arXiv 2406.19995): one parent becomes a family.

For each stage: compress -> recover -> evaluate -> publish. The trunk is the model that goes on from stage to stage; what a stage publishes of it is a
member. The first stage factors the parent's dense Linears; each later one lowers the rank of the fine-tuned factors A·B by the best lower-rank pair
of their product, so that a Linear always stays two factors and the depth never grows.
"""

import time

from plrd_train.family import Family
from plrd_train.lowrank.distributed import changes, decompose
from plrd_train.lowrank.ranks import ratio_of
from plrd_train.recover.checkpoint import Progress
from plrd_train.run import Run, Stage


def make_family(run: Run) -> Family:
    """Make every member that `run` asks for and that is not there yet, going on from where it was stopped."""
    progress = run.resume()
    if progress.entry and not run.family.has(progress.entry["name"]):
        publish(run, progress)  # stopped between the end of its training and here
        run.load_trunk(progress)
    for stage in run.stages[progress.stages :]:
        progress = make_member(run, stage, progress)
    return run.family


def make_member(run: Run, stage: Stage, progress: Progress) -> Progress:
    """One stage: the trunk in the engine becomes the next, smaller trunk, and a member of it is published."""
    entry, ranks = compress(run, stage, progress)
    entry["eval_factored"] = run.evaluate("straight after factoring", stage)

    start = time.perf_counter()
    recovered = run.recover(stage)
    entry["seconds"]["recover"] = time.perf_counter() - start
    spent = recovered.trunk_tokens + recovered.branch_tokens
    entry |= {
        "tokens_stage": spent,
        "tokens_total": progress.tokens_total + spent,
        "tokens_lineage": progress.tokens_lineage + spent,
    }
    progress = Progress(
        stages=stage.index,
        steps=run.counters.steps,
        tokens_total=progress.tokens_total + spent,
        tokens_lineage=progress.tokens_lineage + recovered.trunk_tokens,
        domain_tokens=run.counters.domain_tokens,
        ranks=ranks,
        position=run.position(),
        entry=entry,
    )
    trunk = run.engine.snapshot() if recovered.member is not None else None
    run.checkpoints.save(progress, recovered.member)  # from here on a restart publishes, but trains no more
    publish(run, progress)
    if trunk is not None:
        run.engine.restore(trunk)
    return progress


def compress(run: Run, stage: Stage, progress: Progress) -> tuple[dict, dict[str, int]]:
    """Factor the trunk in the engine to the ranks of `stage`. Returns the member's entry so far, and the ranks of the new trunk."""
    start = time.perf_counter()
    shapes = run.shapes()
    wanted = run.ranks(stage, shapes)
    with run.factoring(stage, changes(shapes, wanted)) as on_done:
        factors = decompose(run.engine, shapes, changes(shapes, wanted), run.config.factorizer.settings, on_done)
    ranks = {**progress.ranks, **wanted}
    run.engine.rebuild(run.architecture(ranks), factors)
    return {
        "name": stage.name,
        "ratio_requested": stage.ratio,
        "ratio": ratio_of(shapes, wanted),
        "params": run.engine.params(),
        "linear_params": sum(shape.params(wanted.get(name)) for name, shape in shapes.items()),
        "ranks": wanted,
        "path": f"members/{stage.name}",
        "made_from": progress.entry["name"] if progress.entry else "parent",
        "engine": run.config.engine.name,
        "world_size": run.world.size,
        "seconds": {"factor": time.perf_counter() - start},
    }, ranks


def publish(run: Run, progress: Progress) -> None:
    """Evaluate the member in the engine on its weights as published, write its folder, and list it in family.json."""
    entry = dict(progress.entry or {})
    start = time.perf_counter()
    entry["eval"] = run.evaluate("after recovery", run.stages[progress.stages - 1])
    entry["seconds"] = {**entry["seconds"], "evaluate": time.perf_counter() - start}
    run.publish(entry, progress.ranks)

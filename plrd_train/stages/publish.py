"""The model in the engine becomes a member: its folder, its place in family.json, the report."""

import dataclasses
from collections.abc import Mapping

from plrd_train.family import Member
from plrd_train.publish.card import member_card
from plrd_train.publish.members import write_model
from plrd_train.report.page import write_report
from plrd_train.run import Run
from plrd_train.stages.evaluate import as_published
from plrd_train.tracking import console


def publish(run: Run, member: Member, ranks: Mapping[str, int]) -> None:
    """Write the model in the engine, whose Linears have `ranks`, as `member`, and list it in family.json once its
    folder is whole. A member that is listed already, as when the checkpoints were lost, stays as it is."""
    run.world.on_main(run.kept.clear)  # the stage has a checkpoint
    if run.family.has(member.name):
        return
    folder = run.family.member_folder(member.name)
    # The folder is there where a run was stopped just before it wrote family.json.
    if not run.world.on_main(folder.exists):
        settings = {
            "config": run.parent_config,
            "ranks": ranks,
            "form": run.config.form.name,
            "dtype": run.dtype,
            "parent": run.parent,
            "card": member_card(member, run.family.parent, dataclasses.asdict(run.config)),
        }
        with as_published(run):
            write_model(run.engine, folder, **settings)
    run.family.members.append(member)
    run.world.on_main(run.family.write)
    if run.world.is_main:
        _, signs = write_report(run.run_dir)
        for sign in signs:
            if sign.stage == len(run.family.members):
                console.say(f"note: {sign.words}")

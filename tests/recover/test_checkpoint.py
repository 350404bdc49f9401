"""The folder checkpoints/ of a run, on a real engine."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from processes import run_ranks

from plrd_train.engine.fsdp import Options, open_engine
from plrd_train.errors import UserError
from plrd_train.hub.models import HubArchitecture
from plrd_train.hub.parents import load_config, open_parent
from plrd_train.hub.weights import WeightReader
from plrd_train.recover.checkpoint import Checkpoints, Progress

PROGRESS = Progress(
    stages=1,
    steps=20,
    tokens_total=2000,
    tokens_lineage=1500,
    ranks={"model.layers.0.mlp.up_proj": 3},
    domain_tokens={"C4": 2000},
    position={"sequence": 20, "cursors": {"0": [0, 1, 2, 3]}},
    entry={"name": "2x", "seconds": {"factor": 0.5}},
)


def opened(world, folder: Path, run_dir: Path):
    parent = open_parent(str(folder))
    engine = open_engine(Options(dtype="fp32", replicas=1, activation_checkpointing=False, compile=False), world)
    architecture = HubArchitecture(load_config(parent))
    engine.load(architecture, WeightReader(parent))
    return engine, architecture, Checkpoints(run_dir, engine)


def plus(engine, value: float) -> dict[str, torch.Tensor]:
    return {name: tensor + value for name, tensor in engine.snapshot().items()}


def same(engine, snapshot: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, snapshot[name]) for name, tensor in engine.snapshot().items())


def stages(world, folder: Path, run_dir: Path) -> list:
    engine, architecture, checkpoints = opened(world, folder, run_dir)
    found = [checkpoints.latest()]
    first, member, second = plus(engine, 0), plus(engine, 1), plus(engine, 2)
    checkpoints.save(PROGRESS)
    found.append(checkpoints.latest())
    checkpoints.load_member(PROGRESS, architecture)
    found.append(same(engine, first))

    engine.restore(second)
    later = dataclasses.replace(PROGRESS, stages=2, steps=40)
    if world.is_main:  # what a run that was killed in the middle may have left
        (run_dir / "checkpoints" / "stage-2.tmp" / "trunk").mkdir(parents=True)
        (run_dir / "checkpoints" / "stage-2.tmp" / "trunk" / "shard-00009.safetensors").write_text("half")
    checkpoints.save(later, member)
    found += [checkpoints.latest(), same(engine, member)]
    checkpoints.load_trunk(later, architecture)
    found.append(same(engine, second))
    checkpoints.load_member(later, architecture)
    found.append(same(engine, member))
    return found


def test_the_newest_checkpoint_alone_is_kept_with_trunk_and_member(save_parent, tmp_path):
    folder, _ = save_parent("llama_tied_scaled_rope")
    later = dataclasses.replace(PROGRESS, stages=2, steps=40)
    for found in run_ranks(2, stages, folder, tmp_path / "run"):
        assert found == [None, PROGRESS, True, later, True, True, True]
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert kept.name == "stage-2" and {path.name for path in kept.iterdir()} == {"trunk", "member", "progress.json"}
    assert not [path for path in kept.rglob("*") if "00009" in path.name]


def latest(world, folder: Path, run_dir: Path) -> Progress | str | None:
    _, _, checkpoints = opened(world, folder, run_dir)
    try:
        return checkpoints.latest()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("content", ["", '{"stages": 1, "st', "[]", '{"what": 1}'])
def test_a_damaged_one_is_named_on_every_rank_and_nothing_is_removed(save_parent, tmp_path, content):
    folder, _ = save_parent("llama")
    for name, text in (("stage-9", json.dumps(dataclasses.asdict(PROGRESS))), ("stage-10", content)):
        path = tmp_path / "checkpoints" / name / "progress.json"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    for message in run_ranks(2, latest, folder, tmp_path):
        assert isinstance(message, str) and f"{tmp_path}/checkpoints/stage-10/progress.json" in message and "\n" not in message
    assert len(os.listdir(tmp_path / "checkpoints")) == 2


def test_one_that_was_not_finished_or_replaced_is_passed_over(save_parent, tmp_path):
    folder, _ = save_parent("llama")
    for name in ("stage-1", "stage-2", "stage-3.tmp"):
        path = tmp_path / "checkpoints" / name / "progress.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(PROGRESS, stages=int(name[6])))))
    (found,) = run_ranks(1, latest, folder, tmp_path)
    assert found == dataclasses.replace(PROGRESS, stages=2)
    assert os.listdir(tmp_path / "checkpoints") == ["stage-2"]

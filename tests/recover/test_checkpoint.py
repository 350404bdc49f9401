"""The folder checkpoints/ of a run, on a real engine."""

import copy
import dataclasses
import io
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from faults import limit_files
from processes import run_ranks
from records import member
from tiny_family import write_parent

from plrd_train.engine.fsdp import Options, open_engine
from plrd_train.errors import UserError
from plrd_train.family import Member
from plrd_train.parents.models import HubArchitecture
from plrd_train.parents.parent import load_config, open_parent
from plrd_train.parents.weights import WeightReader
from plrd_train.recover.checkpoint import Checkpoints
from plrd_train.recover.optimizers.adamw import Optimizer
from plrd_train.recover.progress import Counters, Progress, UnderWay

OPTIMIZER = Optimizer(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
ENDED = Progress(
    stages=1,
    counters=Counters(steps=20, tokens_total=2000, tokens_stage=2000, domain_tokens={"C4": 2000}),
    position={"sequence": 20, "cursors": {"0": [0, 1, 2, 3]}},
    tokens_lineage=1500,
    ranks={"model.layers.0.mlp.up_proj": 3},
    entry=Member(**member("2x", seconds={"factor": 0.5})),
    branched=True,
)
TRAINING = dataclasses.replace(
    ENDED,
    counters=dataclasses.replace(ENDED.counters, steps=25),
    under_way=UnderWay(Member(**member("3x")), {"model.layers.0.mlp.up_proj": 2}, 5, 1.5, True),
)


def opened(world, folder: Path, run_dir: Path, keep: int):
    parent = open_parent(str(folder))
    engine = open_engine(Options(dtype="fp32", replicas=1, activation_checkpointing=False, compile=False), world)
    architecture = HubArchitecture(load_config(parent))
    engine.load(architecture, WeightReader(parent))
    return engine, architecture, Checkpoints(run_dir / "checkpoints", engine, keep)


def plus(engine, value: float) -> dict[str, torch.Tensor]:
    return {name: tensor + value for name, tensor in engine.snapshot().items()}


def same(engine, snapshot: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, snapshot[name]) for name, tensor in engine.snapshot().items())


def saved_and_loaded(world, folder: Path, run_dir: Path) -> list:
    engine, architecture, checkpoints = opened(world, folder, run_dir, keep=2)
    found = [checkpoints.latest()]
    trunk, member = plus(engine, 0), plus(engine, 1)
    if world.is_main:  # what a run that was killed in the middle may have left
        (run_dir / "checkpoints" / "step-00000020.tmp").mkdir(parents=True)
        (run_dir / "checkpoints" / "step-00000020.tmp" / "shard-00009.safetensors").write_text("half")
    checkpoints.save(ENDED, trunk, member)
    checkpoints.wait()
    found.append(checkpoints.latest())
    checkpoints.load(ENDED, architecture)
    found.append(same(engine, trunk))
    checkpoints.load(ENDED, architecture, member=True)
    found.append(same(engine, member))

    moments = {"exp_avg": plus(engine, 2), "exp_avg_sq": plus(engine, 3)}
    engine.start(OPTIMIZER, 5, moments)
    training = copy.deepcopy(TRAINING)
    checkpoints.save_stage(training, trunk)
    training.counters.steps += 1  # training goes on while it is written
    engine.restore(plus(engine, 9))
    checkpoints.wait()
    found.append(checkpoints.latest())
    trunk_again = checkpoints.load_stage(TRAINING, architecture, OPTIMIZER)
    found.append(same(engine, member) and all(torch.equal(trunk_again[name], tensor) for name, tensor in trunk.items()))
    found.append(
        all(
            torch.equal(engine.state()[moment][name], tensor)
            for moment in moments
            for name, tensor in moments[moment].items()
        )
    )
    for steps in (31, 33):
        checkpoints.save_stage(dataclasses.replace(TRAINING, counters=Counters(steps=steps)), None)
    checkpoints.save(dataclasses.replace(ENDED, counters=Counters(steps=40), branched=False), trunk)
    checkpoints.wait()
    return found


def test_what_was_saved_is_loaded_and_the_ends_of_stages_stay_beside_the_newest(save_parent, tmp_path):
    folder, _ = save_parent("llama_tied_scaled_rope")
    for found in run_ranks(2, saved_and_loaded, folder, tmp_path):
        assert found[0] is None
        assert found[1] == ENDED and found[4] == TRAINING
        assert found[2] and found[3] and found[5] and found[6]
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["latest", "step-00000020-stage-1", "step-00000033", "step-00000040-stage-1"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000040-stage-1\n"
    folders.remove("latest")
    assert not list(tmp_path.rglob("*00009*"))
    for name in folders:
        subprocess.run(
            ["sha256sum", "--check", "--quiet", "--strict", "sha256sums"],
            cwd=tmp_path / "checkpoints" / name,
            check=True,
        )
        # No pickle.
        assert {path.suffix for path in (tmp_path / "checkpoints" / name).iterdir()} == {"", ".json", ".safetensors"}


def three(world, folder: Path, run_dir: Path) -> None:
    engine, _, checkpoints = opened(world, folder, run_dir, keep=3)
    for steps in (8, 9, 10):
        checkpoints.save(dataclasses.replace(ENDED, counters=Counters(steps=steps)), engine.snapshot())
    checkpoints.wait()


def latest(world, folder: Path, run_dir: Path) -> tuple[Progress | str | None, str]:
    """What is found, or the error; and what is said about it."""
    _, _, checkpoints = opened(world, folder, run_dir, keep=3)
    with redirect_stdout(io.StringIO()) as said:
        try:
            return checkpoints.latest(), said.getvalue()
        except UserError as error:
            return str(error), said.getvalue()


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent") / "parent"
    write_parent(folder)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("which", ["*.safetensors", "progress.json", "sha256sums"])
@pytest.mark.parametrize("break_it", [flip, truncate, Path.unlink])
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(parent, tmp_path, which, break_it):
    run_ranks(1, three, parent, tmp_path)
    broken = sorted((tmp_path / "checkpoints" / "step-00000010-stage-1").glob(which))[-1]
    break_it(broken)
    ((found, said),) = run_ranks(1, latest, parent, tmp_path)
    assert found.counters.steps == 9
    assert (
        f"step-00000010-stage-1/{broken.name if which != 'sha256sums' else ''}" in said and len(said.splitlines()) == 1
    )


def test_where_all_are_damaged_every_rank_says_so_and_nothing_is_removed(parent, tmp_path):
    run_ranks(2, three, parent, tmp_path)
    for file in tmp_path.glob("checkpoints/*/progress.json"):
        flip(file)
    for message, _ in run_ranks(2, latest, parent, tmp_path):
        assert message.startswith(f"{tmp_path}/checkpoints: every checkpoint here is damaged") and "\n" not in message
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 3


def test_one_of_another_version_is_named(parent, tmp_path):
    run_ranks(1, three, parent, tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000010-stage-1"
    (folder / "progress.json").write_text('{"what": 1}')
    names = sorted(path.name for path in folder.iterdir() if path.name != "sha256sums")
    sums = subprocess.run(["sha256sum", *names], cwd=folder, check=True, capture_output=True, text=True).stdout
    (folder / "sha256sums").write_text(sums)
    ((message, _),) = run_ranks(1, latest, parent, tmp_path)
    assert f"{folder}/progress.json" in message and "\n" not in message


def full_disk(world, folder: Path, run_dir: Path) -> tuple[str, Progress | None]:
    engine, _, checkpoints = opened(world, folder, run_dir, keep=3)
    checkpoints.save(ENDED, engine.snapshot())
    checkpoints.wait()
    limit_files(world.rank, 4096)
    checkpoints.save(TRAINING, engine.snapshot())
    try:
        checkpoints.wait()
    except UserError as error:
        return str(error), checkpoints.latest()
    return "", None


def test_what_cannot_be_written_is_said_by_every_rank_and_the_one_before_stays(parent, tmp_path):
    for message, progress in run_ranks(2, full_disk, parent, tmp_path):
        assert "cannot be written" in message and "\n" not in message
        assert progress == ENDED

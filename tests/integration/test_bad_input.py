"""Bad input, each as a new user would give it: one clear line, status 2, no traceback and no half-made member."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import zstandard
from faults import limit_files, refuse_fsync
from processes import Ended, run_job
from safetensors.torch import load_file, save_file
from tiny_family import write_parent

SHORT = ("stages.tokens=384", "evaluation.tokens=500")  # three steps a stage


def refused(ended: Ended, *named: str) -> str:
    """The one line on standard error, which tells all of `named`."""
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("error: ") and ended.status == 2
    assert "Traceback" not in ended.out
    for part in named:
        assert part in ended.err
    return ended.err


def members(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "members").glob("*")}


@pytest.fixture
def parent(tiny, tmp_path) -> Path:
    """A copy of the tiny parent, to break."""
    return Path(shutil.copytree(tiny / "parent", tmp_path / "parent"))


@pytest.fixture
def corpus(tiny, tmp_path) -> Path:
    """A copy of the tiny corpus, to break."""
    return Path(shutil.copytree(tiny / "corpus", tmp_path / "corpus"))


def test_a_parent_that_is_not_there(command, tmp_path):
    ended = run_job(2, command(tmp_path / "run", *SHORT, f"parent.path={tmp_path}/nothing"))
    refused(ended, f"{tmp_path}/nothing", "no such folder")
    assert not (tmp_path / "run").exists()


def test_a_parent_without_tokenizer(command, parent, tmp_path):
    for file in parent.glob("*token*"):
        file.unlink()
    refused(run_job(2, command(tmp_path / "run", *SHORT, f"parent.path={parent}")), str(parent), "no tokenizer")


def test_more_tokens_than_the_parent_has_positions_for(command, tmp_path):
    write_parent(tmp_path / "parent", "opt")
    arguments = command(tmp_path / "run", *SHORT, f"parent.path={tmp_path}/parent")
    ended = run_job(2, [*arguments, "data.seq_len=65", "recover.global_batch_tokens=130", "evaluation.context=64"])
    refused(ended, "data.seq_len=65:", "position embeddings for 64 tokens; give data.seq_len=64 or less")
    refused(run_job(1, [*arguments, "evaluation.context=256"]), "evaluation.context=256:", "give evaluation.context=64")
    assert not (tmp_path / "run" / "family.json").exists()


def nan_in(parent: Path, *names: str) -> None:
    weights = load_file(parent / "model.safetensors")
    for name in names:
        weights[name][-1] = torch.nan
        weights[name][0] = torch.nan
    save_file(weights, parent / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("ranks", [1, 2])
def test_nan_in_a_weight_of_the_parent(command, parent, tmp_path, ranks):
    nan_in(parent, "model.layers.1.mlp.up_proj.weight")
    ended = run_job(ranks, command(tmp_path / "run", *SHORT, f"parent.path={parent}"))
    refused(ended, f"{parent}/model.safetensors", "model.layers.1.mlp.up_proj.weight", "NaN")


def test_a_truncated_shard_of_training_text(command, corpus, tmp_path):
    shard = corpus / "train" / "chunk1" / "example_train_1.jsonl.zst"
    shard.write_bytes(shard.read_bytes()[:-40])
    refused(run_job(1, command(tmp_path / "run", *SHORT, f"data.train={corpus}")), str(shard), "truncated")
    assert not members(tmp_path / "run")


BAD_LINES = {"not-json": (b"{oops", "not JSON"), "no-text": (b'{"txt": "w3 w4"}', "`text`")}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_document(command, corpus, tmp_path, line, message):
    shard = corpus / "validation" / "chunk1" / "example_holdout_0.jsonl"
    lines = shard.read_bytes().splitlines()
    shard.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    refused(run_job(2, command(tmp_path / "run", *SHORT, f"data.validation={corpus}")), f"{shard}, line 3", message)


def test_a_bad_shard_that_one_rank_meets_in_mid_training(command, corpus, tmp_path):
    """Two streams, one a rank: the odd shards are the second rank's, which finishes some before the bad one."""
    folder = corpus / "train" / "chunk1"
    whole = (
        zstandard.ZstdDecompressor()
        .decompressobj()
        .decompress((folder / "example_train_0.jsonl.zst").read_bytes())
        .splitlines()
    )
    shutil.rmtree(folder)
    folder.mkdir()
    for i in range(8):
        lines = whole[i * 15 : (i + 1) * 15]
        (folder / f"example_train_{i}.jsonl").write_bytes(b"\n".join([*lines, b"[]"] if i == 7 else lines))
    run_dir = tmp_path / "run"
    arguments = command(run_dir, SHORT[1], f"data.train={corpus}", "data.streams=2", "stages.tokens=[768,1280]")
    refused(run_job(2, arguments), "example_train_7.jsonl, line 16", "not a JSON object", "data.skip_bad=true")
    assert 6 < len((run_dir / "metrics.jsonl").read_text().splitlines()) < 16  # in the second stage
    assert members(run_dir) == {"1.25x"}
    again = run_job(2, [*arguments, "data.skip_bad=true"])
    assert (again.status, again.err) == (0, "") and "stage 1" not in again.out
    assert members(run_dir) == {"1.25x", "1.6x"} and len((run_dir / "metrics.jsonl").read_text().splitlines()) == 16


def empty_folder(train: Path) -> None:
    train.mkdir(parents=True)


def empty_shard(train: Path) -> None:
    train.mkdir(parents=True)
    (train / "a.jsonl").touch()


def empty_texts(train: Path) -> None:
    train.mkdir(parents=True)
    (train / "a.jsonl").write_text('{"text": ""}\n' * 20)


@pytest.mark.parametrize(
    ("write", "message"),
    [(empty_folder, "no shards"), (empty_shard, "empty corpus"), (empty_texts, "hold no text")],
    ids=["no-shard", "no-bytes", "no-text"],
)
def test_an_empty_corpus(command, tmp_path, write, message):
    train = tmp_path / "text"
    write(train)
    refused(run_job(2, command(tmp_path / "run", *SHORT, f"data.train={train}")), str(train), message)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("recover.learning_rate=1",), "recover.learning_rate: unknown key"),
        (("stages.ratios=[0.8]",), "stages.ratios: a ratio of 0.8"),
        (("data.streams=1",), "data.streams: 1 streams cannot feed 2 ranks"),
        (("engine.replicas=3",), "engine.replicas=3 does not divide the 2 ranks"),
        (("linears.include=[nothing.*]",), "linears.include"),
        (("experiment=quickstat",), "quickstat"),
        (("data.append_eos=true",), "data.append_eos"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_keys(command, parent, tmp_path, overrides, named):
    if "append_eos" in named:
        settings = json.loads((parent / "tokenizer_config.json").read_text())
        (parent / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    refused(run_job(2, command(tmp_path / "run", *SHORT, f"parent.path={parent}", *overrides)), named)
    assert not members(tmp_path / "run")


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    ended = run_job(1, command(run_dir, *SHORT))
    assert (ended.status, ended.err) == (0, "")
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ("recover.lr=1e-3", "data.seq_len=32"),
            ("recover.lr (0.004 there, 0.001 now)", "data.seq_len (16 there, 32 now)"),
        ),
        (("stages.ratios=[1.25]",), ("stages", "1.6")),
        (("stages.ratios=[1.25,1.7]",), ("stages", "1.6", "1.7")),
        (("stages.tokens=512",), ("stages", "384", "512")),
    ],
    ids=["other-values", "fewer-stages", "other-ratio", "other-budget"],
)
def test_a_run_dir_that_holds_another_run(command, run_dir, overrides, named):
    before = contents(run_dir)
    refused(run_job(2, command(run_dir, *SHORT, *overrides)), "run_dir", str(run_dir), *named)
    assert contents(run_dir) == before


@pytest.mark.parametrize("damaged", ["family.json", "config.yaml"])
def test_a_damaged_file_of_the_run(command, run_dir, damaged):
    file = run_dir / damaged
    file.write_bytes(file.read_bytes()[:-150].replace(b"experiment:", b"experiment: {"))
    before = contents(run_dir)
    refused(run_job(2, command(run_dir, *SHORT)), str(run_dir / damaged))
    assert contents(run_dir).keys() == before.keys() and contents(run_dir / "members").items() <= before.items()


@pytest.mark.parametrize("damaged", ["progress.json", "*.safetensors", "sha256sums"])
def test_checkpoints_that_are_all_damaged(command, run_dir, damaged):
    for file in run_dir.glob(f"checkpoints/step-*/{damaged}"):
        file.write_bytes(file.read_bytes()[:-150])
    before = contents(run_dir)
    refused(run_job(2, command(run_dir, *SHORT)), f"{run_dir}/checkpoints: every checkpoint here is damaged")
    after = contents(run_dir)
    for files in (before, after):
        del files[run_dir / "config.yaml"]  # names the run_dir that this one was copied from
    assert after == before


def test_a_lost_family_json(command, run_dir):
    (run_dir / "family.json").unlink()
    refused(run_job(2, command(run_dir, *SHORT)), f"{run_dir}/family.json")


def test_a_run_dir_where_a_file_is_in_the_way(command, tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(run_job(2, command(run_dir, *SHORT)), str(tmp_path / "file"))


def test_a_run_whose_checkpoints_are_lost_begins_again_and_keeps_its_members(command, run_dir):
    family, published = json.loads((run_dir / "family.json").read_text()), contents(run_dir / "members")
    shutil.rmtree(run_dir / "checkpoints")
    ended = run_job(1, command(run_dir, *SHORT, "stages.ratios=[1.25,1.6,2]"))
    assert (ended.status, ended.err) == (0, "")
    again = json.loads((run_dir / "family.json").read_text())
    assert again["members"][:2] == family["members"] and [member["name"] for member in again["members"][2:]] == ["2x"]
    assert published.items() <= contents(run_dir / "members").items()


def test_a_corpus_that_changed_under_a_run(command, corpus, tmp_path):
    arguments = command(tmp_path / "run", *SHORT, f"data.train={corpus}", "stages.ratios=[1.25]")
    assert run_job(1, arguments).status == 0
    (corpus / "train" / "chunk1" / "example_train_2.jsonl.zst").unlink()
    refused(run_job(2, [*arguments, "stages.ratios=[1.25,2]"]), "data.train")


@pytest.mark.parametrize("what", ["member", "checkpoint"])
def test_a_disk_that_is_full(command, tmp_path, what):
    """On two ranks a member's one file is larger than a checkpoint's two, so one limit can hit either."""
    arguments = command(tmp_path / "run", *SHORT, "stages.ratios=[1.25]")
    refused(run_job(2, arguments, limit_files, 60_000 if what == "member" else 30_000), str(tmp_path / "run"))
    assert not members(tmp_path / "run")
    assert bool(list((tmp_path / "run").glob("checkpoints/step-*[0-9]"))) == (what == "member")
    again = run_job(2, arguments)
    assert (again.status, again.err) == (0, "")
    assert members(tmp_path / "run") == {"1.25x"} and ("recover at" in again.out) == (what == "checkpoint")


def test_a_disk_that_fails(command, tmp_path):
    ended = run_job(1, command(tmp_path / "run", *SHORT, "stages.ratios=[1.25]"), refuse_fsync, errno.EIO, False)
    refused(ended, str(tmp_path / "run" / "config.yaml"), os.strerror(errno.EIO))


def test_a_small_disk_that_is_really_full(command, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=176k", "none", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("only root may mount a small disk")
    try:
        arguments = command(disk / "run", *SHORT, "stages.ratios=[1.25]")
        refused(run_job(2, arguments), str(disk), os.strerror(errno.ENOSPC))
        assert not members(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again = run_job(2, arguments)
        assert (again.status, again.err) == (0, "") and members(disk / "run") == {"1.25x"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_multiple_that_no_rank_reaches(command, tmp_path):
    ended = run_job(2, command(tmp_path / "run", *SHORT, "ranks.multiple=512"))
    refused(ended, "ranks.multiple", "below 512")
    assert not members(tmp_path / "run")

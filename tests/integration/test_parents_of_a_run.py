"""Where the parent of a run comes from: a hub id whose revision is pinned, or training from scratch."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from faults import offline_hub, on_a_share
from processes import run_job
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

COMMITS = {"v1": "a1" * 20, "v2": "b2" * 20}
SHORT = ("stages.ratios=[1.5]", "stages.tokens=256", "evaluation.tokens=300")


@pytest.fixture
def hub(tiny, tmp_path) -> Path:
    """The cache of a hub that has the tiny parent as owner/tiny, at two commits."""
    repository = tmp_path / "cache" / "models--owner--tiny"
    for name, commit in COMMITS.items():
        shutil.copytree(tiny / "parent", repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    return tmp_path / "cache"


def test_a_revision_is_pinned_to_its_commit(command, hub, tmp_path):
    run_dir = tmp_path / "run"

    def start(revision: str, *overrides: str):
        arguments = command(run_dir, *SHORT, "parent.path=owner/tiny", f"parent.revision={revision}", *overrides)
        return run_job(1, arguments, offline_hub, hub)

    def pinned() -> str:
        return yaml.safe_load((run_dir / "config.yaml").read_text())["parent"]["revision"]

    first = start("v1")
    assert (first.status, first.err) == (0, "") and pinned() == COMMITS["v1"]
    assert json.loads((run_dir / "family.json").read_text())["parent"]["revision"] == COMMITS["v1"]
    for revision in ("v1", "null", COMMITS["v1"]):  # the same command, or one that asks for nothing else
        again = start(revision)
        assert (again.status, again.err, revision) == (0, "", revision) and pinned() == COMMITS["v1"]
    other = start("v2", "stages.ratios=[1.5,2]")
    assert (
        other.status == 2
        and other.err.startswith("error: parent.revision")
        and COMMITS["v1"] in other.err
        and COMMITS["v2"] in other.err
    )
    (hub / "models--owner--tiny" / "refs" / "v1").write_text(COMMITS["v2"])  # the tag has moved since
    moved = start("v1", "stages.ratios=[1.5,2]")
    assert moved.status == 2 and moved.err == other.err


def scratch(tiny: Path, run_dir: Path, *overrides: str) -> list[str]:
    llama = (
        "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: "
        "4, tie_word_embeddings: true}"
    )
    own = f"{{architecture: {llama}, tokenizer: {tiny / 'parent'}, vocab_size: 64, tokens: 768, lr: 1e-2}}"
    return ["parent.path=" + str(run_dir / "parent"), f"+parent.scratch={own}", *SHORT, *overrides]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def closed(folder: Path, umask: int) -> list[str]:
    """What lies under `folder` with other permissions than this umask leaves."""
    paths = [folder, *folder.rglob("*")]
    return [str(path) for path in paths if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask]


def test_a_parent_from_scratch_is_a_plain_model_and_is_kept(command, tiny, tmp_path):
    """With it goes a whole family, on a disk of a network: everything has the permissions that the umask leaves, and
    folders cannot be synced."""
    made = {}
    for ranks, umask in ((1, 0o022), (2, 0o007)):
        run_dir = tmp_path / str(ranks)
        ended = run_job(ranks, command(run_dir, *scratch(tiny, run_dir)), on_a_share, umask)
        assert (ended.status, ended.err) == (0, "")
        assert [*run_dir.glob("checkpoints/*/*.safetensors")] and [*run_dir.glob("members/*/*.safetensors")]
        assert not closed(run_dir, umask)
        made[ranks] = rows(run_dir / "scratch" / "metrics.jsonl")
        assert [row["tokens/total"] for row in made[ranks]] == [128 * (i + 1) for i in range(6)]
        assert [row["step"] for row in rows(run_dir / "metrics.jsonl")] == [0, 1]  # the family's own steps begin anew
    assert [row["train/loss"] for row in made[2]] == pytest.approx([row["train/loss"] for row in made[1]], abs=1e-5)
    assert made[1][-1]["train/loss"] < made[1][0]["train/loss"]

    parent = tmp_path / "2" / "parent"
    model = AutoModelForCausalLM.from_pretrained(parent)
    assert type(model).__name__ == "LlamaForCausalLM" and len(AutoTokenizer.from_pretrained(parent)) == 64
    family = json.loads((tmp_path / "2" / "family.json").read_text())
    assert family["parent"]["params"] == sum(parameter.numel() for parameter in model.parameters())

    written = (parent / "model.safetensors").stat().st_mtime_ns
    more = run_job(2, command(tmp_path / "2", *scratch(tiny, tmp_path / "2", "stages.ratios=[1.5,2]")))
    assert (more.status, more.err) == (0, "") and "train the parent" not in more.out
    assert (parent / "model.safetensors").stat().st_mtime_ns == written


def test_a_parent_from_scratch_is_annealed_where_a_branch_is_asked_for(command, tiny, tmp_path):
    """Three steps of trunk and three of a branch are not three steps of trunk."""
    weights = {}
    for name, changed in (
        ("branch", ("schedule.branch=0.5",)),
        ("trunk", ("schedule.branch=0", "parent.scratch.tokens=384")),
    ):
        run_dir = tmp_path / name
        ended = run_job(
            1, command(run_dir, *scratch(tiny, run_dir, "schedule=constant", "schedule.warmup=0", *changed))
        )
        assert (ended.status, ended.err) == (0, "")
        weights[name] = load_file(run_dir / "parent" / "model.safetensors")
    losses = {
        name: [row["train/loss"] for row in rows(tmp_path / name / "scratch" / "metrics.jsonl")] for name in weights
    }
    assert losses["branch"][:3] == losses["trunk"] and len(losses["branch"]) == 6
    assert any((weights["branch"][name] != tensor).any() for name, tensor in weights["trunk"].items())

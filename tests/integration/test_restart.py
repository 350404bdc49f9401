"""The same command continues a run that was killed, wherever that was, and ends as if nothing had happened."""

import json
import os
import shutil
from pathlib import Path

import pytest
from faults import kill_before
from processes import run_job
from safetensors.torch import load_file

STEPS = 6  # a stage
SHORT = f"stages.tokens={STEPS * 128}"
BRANCH = ("schedule.branch=0.34", "checkpoint.keep=1")  # two steps of the six


def records(run_dir: Path) -> tuple[dict, list[dict], list[dict]]:
    """family.json, metrics.jsonl and events.jsonl without what is measured by the clock."""
    family = json.loads((run_dir / "family.json").read_text())
    family["members"] = [{**member, "seconds": sorted(member["seconds"])} for member in family["members"]]
    metrics, events = (
        [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "events.jsonl")
    )
    timed = ("perf/tokens_per_s", "perf/memory_gib", "factor/seconds")
    return family, *(
        [{name: value for name, value in row.items() if name not in timed} for row in rows]
        for rows in (metrics, events)
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same_members(one: Path, other: Path) -> bool:
    """Bit by bit; the cards name their run_dirs, and differ."""
    left, right = files(one / "members"), files(other / "members")
    return left.keys() == right.keys() and all(
        right[name] == content for name, content in left.items() if not name.endswith("README.md")
    )


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """undisturbed(ranks, *overrides) -> the run_dir of such a run, never killed; made once."""
    made = {}

    def make(ranks: int, *overrides: str) -> Path:
        if (ranks, overrides) not in made:
            run_dir = made[ranks, overrides] = tmp_path_factory.mktemp("undisturbed") / "run"
            finish(ranks, command(run_dir, SHORT, *overrides))
        return made[ranks, overrides]

    return make


def finish(ranks: int, arguments: list[str]) -> str:
    """Run to the end without a complaint; what was said on standard output."""
    ended = run_job(ranks, arguments)
    assert (ended.status, ended.err) == (0, "")
    return ended.out


@pytest.fixture(scope="module")
def killed_in_stage_2(command, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    assert (
        run_job(2, command(run_dir, SHORT), kill_before, "plrd_train.tracking.tracker:Tracker.log", STEPS + 3).status
        == -9
    )
    assert len(records(run_dir)[1]) == STEPS + 3
    return run_dir


def test_a_run_killed_in_mid_training_ends_as_if_it_had_not_been(command, undisturbed, killed_in_stage_2, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(killed_in_stage_2, run_dir)
    finish(2, command(run_dir, SHORT))
    assert same_members(run_dir, undisturbed(2))
    assert records(run_dir) == records(undisturbed(2))
    assert [row["step"] for row in records(run_dir)[1]] == list(range(2 * STEPS))


def test_a_killed_run_goes_on_on_another_number_of_ranks(command, undisturbed, killed_in_stage_2, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(killed_in_stage_2, run_dir)
    finish(3, command(run_dir, SHORT))
    (family, found, _), (_, wanted, _) = records(run_dir), records(undisturbed(2))
    assert [row["train/loss"] for row in found] == pytest.approx([row["train/loss"] for row in wanted], abs=1e-4)
    assert [member["world_size"] for member in family["members"]] == [2, 3]


# One after the other in one run_dir: where the run is killed, and the members that family.json lists then.
KILLS = [
    ("plrd_train.family:Family.write", 0, None),
    ("plrd_train.tracking.tracker:Tracker.log", STEPS // 2, []),
    ("plrd_train.recover.checkpoint:Checkpoints._make_visible", 0, []),
    ("plrd_train.publish.members:write_member", 0, []),
    ("plrd_train.tracking.tracker:Tracker.log", STEPS - 1, ["1.25x"]),  # in the branch
    ("plrd_train.recover.checkpoint:Checkpoints._tidy", 1, ["1.25x"]),  # the new checkpoint is there
    ("plrd_train.publish.members:_ShardWriter.close", 0, ["1.25x"]),
    ("plrd_train.family:Family.write", 0, ["1.25x"]),
    ("plrd_train.stages.publish:write_report", 0, ["1.25x", "1.6x"]),
]


@pytest.fixture(scope="module")
def survivor(command, tmp_path_factory) -> Path:
    """The run_dir of a run of two ratios, with branches, that went on after it was killed at each point of KILLS."""
    run_dir = tmp_path_factory.mktemp("survivor") / "run"
    for where, call, listed in KILLS:
        assert run_job(1, command(run_dir, SHORT, *BRANCH), kill_before, where, call).status == -9, where
        members = {path.name for path in run_dir.glob("members/[!.]*")}
        if listed is None:
            assert not (run_dir / "family.json").exists() and not members
        else:
            assert [member["name"] for member in records(run_dir)[0]["members"]] == listed and members >= set(listed), (
                where
            )
        if "_tidy" in where:
            there = {path.name for path in (run_dir / "checkpoints").iterdir()}
            assert there == {"latest", f"step-{STEPS:08d}-stage-1", f"step-{2 * STEPS:08d}-stage-2"}
    finish(1, command(run_dir, SHORT, *BRANCH))
    return run_dir


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(survivor, undisturbed):
    expected = undisturbed(1, *BRANCH)
    assert same_members(survivor, expected)
    for found, wanted in zip(records(survivor), records(expected), strict=True):
        assert found == wanted
    assert files(survivor).keys() == files(expected).keys()  # no leftovers
    assert "1.6x" in (survivor / "report" / "report.html").read_text()


def test_a_second_start_of_a_finished_run_changes_nothing(command, survivor, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(survivor, run_dir)
    written = {path: path.stat().st_mtime_ns for path in (run_dir / "members").rglob("*")}
    before = files(run_dir)
    (run_dir / "members" / ".2x.part").mkdir()  # what a killed run may have left
    (run_dir / "checkpoints" / "step-00000099.tmp").mkdir()
    assert "recover at" not in finish(1, command(run_dir, SHORT, *BRANCH))
    assert {path: path.stat().st_mtime_ns for path in written} == written
    after = files(run_dir)
    for name in ("config.yaml", "report/report.html"):  # the one names run_dir, the other shows it
        del before[name], after[name]
    assert after == before


def at_home(rank: int, home: Path) -> None:
    os.environ["HOME"] = str(home)
    os.chdir(home / "elsewhere")


def test_a_run_goes_on_where_home_is_spelled_otherwise(command, tiny, tmp_path):
    """Its held-out text is what it trains on, which both starts tell."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("parent", "corpus"):
        (tmp_path / name).symlink_to(tiny / name)
    written = {}
    for home in ("~", tmp_path):
        paths = (
            f"parent.path='{home}/parent'",
            f"data.train='{home}/corpus'",
            f"data.validation='{home}/corpus/train'",
        )
        ended = run_job(
            1, command(Path(f"'{home}/run'"), *paths, "stages.ratios=[1.25]", "stages.tokens=256"), at_home, tmp_path
        )
        assert (ended.status, ended.err) == (0, "")
        assert ended.out.count("note: trained on as well as evaluated on: 3 of 3 shards") == 1
        written[home] = files(tmp_path / "run")
    assert written["~"]["config.yaml"] == written[tmp_path]["config.yaml"] and b"~" not in written["~"]["config.yaml"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_one_more_ratio_adds_its_member_and_touches_no_other(command, undisturbed, survivor):
    three = "stages.ratios=[1.25,1.6,2]"
    written = {path: path.stat().st_mtime_ns for path in (survivor / "members").rglob("*") if path.is_file()}
    members, (family, metrics, _) = files(survivor / "members"), records(survivor)
    finish(1, command(survivor, SHORT, *BRANCH, three))
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert {
        name: content for name, content in files(survivor / "members").items() if not name.startswith("2x/")
    } == members
    extended, more, _ = records(survivor)
    assert extended["members"][:2] == family["members"] and extended["parent"] == family["parent"]
    assert [member["name"] for member in extended["members"][2:]] == ["2x"] and more[: len(metrics)] == metrics
    # It is the member that a run with three ratios from the start would have made.
    at_once = undisturbed(1, *BRANCH, three)
    assert same_members(survivor, at_once) and records(at_once)[0] == extended


def test_the_member_of_a_branch_is_annealed_and_the_trunk_goes_on(command, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    finish(1, command(run_dir, SHORT, *BRANCH, "stages.ratios=[1.25]", "schedule=constant"))
    (file,) = (run_dir / "checkpoints" / f"step-{STEPS:08d}-stage-1").glob("*.safetensors")
    tensors = load_file(file)
    trunk, member = (
        {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(part)}
        for part in ("model/", "member/")
    )
    published = load_file(run_dir / "members" / "1.25x" / "model.plrd.safetensors")
    assert published.keys() == member.keys() and all(
        (published[name] == tensor).all() for name, tensor in member.items()
    )
    assert any((trunk[name] != tensor).any() for name, tensor in member.items())
    rates = [row["train/lr"] for row in records(run_dir)[1]]
    # The trunk's rate stays, the branch's falls, and no step is wasted at zero.
    assert rates[1] == rates[3] > rates[4] > rates[5] > 0

    finish(1, command(run_dir, SHORT, *BRANCH, "schedule=constant"))
    family, metrics, events = records(run_dir)
    linear = "model.layers.0.mlp.up_proj"
    (error,) = (row["factor/rel_error"] for row in events if row.get("linear") == linear and row["stage/index"] == 2)
    rank = family["members"][1]["ranks"][linear]

    def lost(weights: dict) -> float:
        values = (weights[f"{linear}.up.weight"].double() @ weights[f"{linear}.down.weight"].double()).svd().S
        return (values[rank:].norm() / values.norm()).item()

    assert error == pytest.approx(lost(trunk), rel=1e-4) and error != pytest.approx(lost(member), rel=1e-3)
    spent, trunk_only = STEPS * 128, (STEPS - 2) * 128
    counted = [[member[f"tokens_{which}"] for which in ("stage", "total", "lineage")] for member in family["members"]]
    assert counted == [[spent, spent, spent], [spent, 2 * spent, trunk_only + spent]]
    assert [row["tokens/total"] for row in metrics] == [128 * (i + 1) for i in range(2 * STEPS)]

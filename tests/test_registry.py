"""Components by name: ours, and those of a plug-in, which adds one of each kind and edits nothing."""

import json
import subprocess
import sys

import pytest
from plug_in import install
from safetensors import safe_open

from plrd_train.compress.forms import FORMS
from plrd_train.registry import NoSettings, Registry


def run(folder, *arguments):
    """A process that finds plug-ins in `folder`."""
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def test_a_plug_in_adds_one_of_each_kind(command, tmp_path):
    install(tmp_path / "site")
    settings = {
        "one": (
            "form=halves",
            "factorizer=labelled",
            "factorizer.label=0.25",
            "objective=halved",
            "schedule=falling",
            "schedule.factor=0.25",
            "optimizer=adam",
        ),
        "two": (
            "factorizer=counting",
            "factorizer.calibration_tokens=48",
            "ranks=fixed",
            "ranks.rank=3",
            "evaluation=[perplexity,accuracy]",
            "evaluation.accuracy.first=7",
        ),
    }
    family, steps, events = {}, {}, {}
    for name, chosen in settings.items():
        done = run(
            tmp_path / "site",
            "plrd_train",
            *command(tmp_path / name, *chosen, "stages.ratios=[2]", "stages.tokens=256", "evaluation.tokens=500"),
        )
        assert done.returncode == 0, done.stderr
        family[name] = json.loads((tmp_path / name / "family.json").read_text())["members"][0]
        steps[name] = [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        rows = map(json.loads, (tmp_path / name / "events.jsonl").read_text().splitlines())
        events[name] = [row for row in rows if row["kind"] == "factor"]

    one, two = family["one"], family["two"]
    assert one["form"] == "halves" and one["ratio"] >= 2
    with safe_open(tmp_path / "one" / one["path"] / "model.plrd.safetensors", framework="pt") as member:
        for name, rank in one["ranks"].items():
            m, n = (
                member.get_slice(f"{name}.{part}.weight").get_shape()[side] for part, side in (("up", 0), ("down", 1))
            )
            assert rank > 0.9 * m * n / (m + n)  # at 2x: two factors would have half of that
    assert {event["factor/rel_error"] for event in events["one"]} == {0.25}  # the method's setting
    first, second = steps["one"]
    assert first["train/loss"] < 0.9 * steps["two"][0]["train/loss"]  # the objective takes three quarters
    assert first["train/loss/half"] == pytest.approx(2 * first["train/loss"] / 3)
    assert first["train/loss/quarter"] == pytest.approx(first["train/loss"] / 3)
    assert not any(name.startswith("train/loss/") for name in steps["two"][0])  # its objective has one term
    assert (first["train/lr"], second["train/lr"]) == (4e-3, 1e-3)  # the schedule's factor

    assert set(two["ranks"].values()) == {3} and len(two["ranks"]) == len(one["ranks"])  # the allocation's setting
    assert {event["factor/rel_error"] for event in events["two"]} == {48}  # the statistic counts every token
    assert [event["linear"] for event in events["two"]] == list(two["ranks"])  # in order

    measured = two["eval"]["accuracy"]
    parent = json.loads((tmp_path / "two" / "family.json").read_text())["parent"]["eval"]["accuracy"]
    assert measured["tokens"] == parent["tokens"] and 0 <= measured["accuracy"] <= 1
    assert "accuracy" not in one["eval"]
    evaluate = ("plrd_train.cli", "evaluate", tmp_path / "two", "--with", "accuracy")
    results = json.loads(run(tmp_path / "site", *evaluate, "--json").stdout)  # with the settings of the run
    assert results["members"]["2x"]["accuracy"] == measured and results["parent"]["accuracy"] == parent
    fewer = json.loads(run(tmp_path / "site", *evaluate, "accuracy.first=1", "--json").stdout)
    assert fewer["parent"]["accuracy"]["tokens"] < parent["tokens"]


def test_a_plug_in_adds_a_verb(tmp_path):
    install(tmp_path)
    helped = run(tmp_path, "plrd_train.cli", "--help").stdout
    assert "say a word loudly" in helped and "plrd shout hey" in helped and "plrd show" in helped
    assert run(tmp_path, "plrd_train.cli", "shout", "hey").stdout == "HEY\n"
    assert json.loads(run(tmp_path, "plrd_train.cli", "shout", "hey", "--json").stdout) == {"word": "HEY"}


def test_a_verb_is_not_hindered_by_another_that_is_broken(tmp_path):
    install(tmp_path, files={"commands/broken.py": "import no_such_package\n"})
    done = run(tmp_path, "plrd_train.cli", "show", tmp_path)
    assert done.returncode == 2 and "no family.json here" in done.stderr


def test_a_name_that_two_packages_have_is_refused(tmp_path):
    install(tmp_path, files={"compress/methods/svd.py": ""})
    done = run(tmp_path, "plrd_train.cli", "plan", "experiment=quickstart")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "method svd: plrd_train.compress.methods.svd and mine.compress.methods.svd; rename one of them"
    )


def test_a_plug_in_that_is_gone_is_named(tmp_path):
    install(tmp_path)
    (tmp_path / "mine").rename(tmp_path / "yours")
    done = run(tmp_path, "plrd_train.cli", "plan", "experiment=quickstart")
    assert done.returncode == 2 and "plug-in mine: there is no package of that name" in done.stderr


def test_parts_are_no_components():
    engines = Registry("engine", "engine", settings="Options")
    assert engines.names() == ["fsdp", "zero3"]
    with pytest.raises(KeyError):
        engines.get("_deepspeed")


def test_a_component_without_settings_has_none():
    assert FORMS.settings_of("lowrank") is NoSettings

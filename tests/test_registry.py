"""Components by name: ours, and those of a plug-in, which adds one of each kind and edits nothing."""

import json
import subprocess
import sys

import pytest
from plug_in import install

from plrd_train.compress.forms import FORMS
from plrd_train.registry import NoSettings, Registry


def run(folder, *arguments):
    """A process that finds plug-ins in `folder`."""
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def test_a_plug_in_adds_one_of_each_kind(command, tmp_path):
    install(tmp_path / "site")
    chosen = ("form=halves", "factorizer=scaled", "factorizer.scale=0.25", "objective=halved", "stages.ratios=[2]")
    family, steps = {}, {}
    evaluated = ("evaluation=[perplexity,accuracy]", "evaluation.accuracy.first=7")
    for name, settings in {"ours": ["stages.ratios=[2]", *evaluated], "theirs": chosen}.items():
        done = run(tmp_path / "site", "plrd_train", *command(tmp_path / name, *settings))
        assert done.returncode == 0, done.stderr
        family[name] = json.loads((tmp_path / name / "family.json").read_text())["members"][0]
        steps[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
    assert family["theirs"]["form"] == "halves"
    assert all(rank > 1.9 * family["ours"]["ranks"][name] for name, rank in family["theirs"]["ranks"].items())
    assert family["theirs"]["eval_factored"] != family["ours"]["eval_factored"]  # of scaled weights
    measured, other = (
        family["ours"]["eval"],
        json.loads((tmp_path / "ours" / "family.json").read_text())["parent"]["eval"],
    )
    assert measured["accuracy"]["tokens"] == other["accuracy"]["tokens"] and 0 <= measured["accuracy"]["accuracy"] <= 1
    assert "accuracy" not in family["theirs"]["eval"]
    again = run(tmp_path / "site", "plrd_train.commands", "evaluate", tmp_path / "ours", "--with", "accuracy", "--json")
    results = json.loads(again.stdout)  # with the settings of the run
    assert results["members"]["2x"]["accuracy"] == measured["accuracy"]
    assert results["parent"]["accuracy"] == other["accuracy"]
    few = ("--with", "accuracy", "accuracy.first=1", "--json")
    fewer = json.loads(run(tmp_path / "site", "plrd_train.commands", "evaluate", tmp_path / "ours", *few).stdout)
    assert fewer["parent"]["accuracy"]["tokens"] < other["accuracy"]["tokens"]
    assert steps["theirs"]["train/loss"] < 0.6 * steps["ours"]["train/loss"]


def test_a_plug_in_adds_a_verb(tmp_path):
    install(tmp_path)
    helped = run(tmp_path, "plrd_train.commands", "--help").stdout
    assert "say a word loudly" in helped and "plrd shout hey" in helped and "plrd show" in helped
    assert run(tmp_path, "plrd_train.commands", "shout", "hey").stdout == "HEY\n"
    assert json.loads(run(tmp_path, "plrd_train.commands", "shout", "hey", "--json").stdout) == {"word": "HEY"}


def test_a_verb_is_not_hindered_by_another_that_is_broken(tmp_path):
    install(tmp_path, files={"commands/broken.py": "import no_such_package\n"})
    done = run(tmp_path, "plrd_train.commands", "show", tmp_path)
    assert done.returncode == 2 and "no family.json here" in done.stderr


def test_a_name_that_two_packages_have_is_refused(tmp_path):
    install(tmp_path, files={"compress/methods/svd.py": ""})
    done = run(tmp_path, "plrd_train.commands", "plan", "experiment=quickstart")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "method svd: plrd_train.compress.methods.svd and mine.compress.methods.svd; rename one of them"
    )


def test_a_plug_in_that_is_gone_is_named(tmp_path):
    install(tmp_path)
    (tmp_path / "mine").rename(tmp_path / "yours")
    done = run(tmp_path, "plrd_train.commands", "plan", "experiment=quickstart")
    assert done.returncode == 2 and "plug-in mine: there is no package of that name" in done.stderr


def test_parts_are_no_components():
    engines = Registry("engine", "engine", settings="Options")
    assert engines.names() == ["fsdp", "zero3"]
    with pytest.raises(KeyError):
        engines.get("_deepspeed")


def test_a_component_without_settings_has_none():
    assert FORMS.settings_of("lowrank") is NoSettings

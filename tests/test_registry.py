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
    chosen = ("form=halves", "factorizer=scaled", "factorizer.scale=0.25", "stages.ratios=[2]")
    chosen += ("objective=halved", "schedule=falling", "schedule.factor=0.25", "optimizer=adam")
    family, steps = {}, {}
    for name, settings in {"ours": ["stages.ratios=[2]"], "theirs": chosen}.items():
        done = run(tmp_path / "site", "plrd_train", *command(tmp_path / name, *settings))
        assert done.returncode == 0, done.stderr
        family[name] = json.loads((tmp_path / name / "family.json").read_text())["members"][0]
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        steps[name] = [json.loads(row) for row in rows]
    assert family["theirs"]["form"] == "halves"
    assert all(rank > 1.9 * family["ours"]["ranks"][name] for name, rank in family["theirs"]["ranks"].items())
    assert family["theirs"]["eval_factored"] != family["ours"]["eval_factored"]  # of scaled weights
    first, second, *_ = steps["theirs"]
    assert first["train/loss"] < 0.9 * steps["ours"][0]["train/loss"]
    assert first["train/loss/half"] == pytest.approx(2 * first["train/loss"] / 3)
    assert first["train/loss/quarter"] == pytest.approx(first["train/loss"] / 3)
    assert not any(name.startswith("train/loss/") for name in steps["ours"][0])  # which has one term
    assert second["train/lr"] == first["train/lr"] / 4
    assert first["train/lr"] == 4e-3


def test_a_name_that_two_packages_have_is_refused(tmp_path):
    install(tmp_path, files={"compress/methods/svd.py": ""})
    done = run(tmp_path, "plrd_train.commands.cli", "plan", "experiment=quickstart")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "method svd: plrd_train.compress.methods.svd and mine.compress.methods.svd; rename one of them"
    )


def test_a_plug_in_that_is_gone_is_named(tmp_path):
    install(tmp_path)
    (tmp_path / "mine").rename(tmp_path / "yours")
    done = run(tmp_path, "plrd_train.commands.cli", "plan", "experiment=quickstart")
    assert done.returncode == 2 and "plug-in mine: there is no package of that name" in done.stderr


def test_parts_are_no_components():
    engines = Registry("engine", "engine", settings="Options")
    assert engines.names() == ["fsdp", "zero3"]
    with pytest.raises(KeyError):
        engines.get("_deepspeed")


def test_a_component_without_settings_has_none():
    assert FORMS.settings_of("lowrank") is NoSettings

"""config.yaml of a run: what may differ when the same folder is used again, and what is refused by name."""

import copy
import functools

import pytest
import yaml

from plrd_train.config import resolved
from plrd_train.config.compose import compose
from plrd_train.errors import UserError

GIVEN = (
    "experiment=tinystories",
    "parent.path=p",
    "data.train=t",
    "data.validation=v",
    "data.seq_len=256",
    "stages.ratios=[1.5,2]",
)


@functools.cache
def composed() -> dict:
    (job,) = compose([*GIVEN, "stages.tokens=100000", "seed=0", "engine.dtype=fp32", "optimizer.betas=[0.9,0.95]"])
    return job


def source(*overrides: str) -> dict:
    """A config in which these `key=value` stand."""
    job = copy.deepcopy(composed())
    for override in overrides:
        key, _, value = override.partition("=")
        *groups, leaf = key.split(".")
        section = functools.reduce(dict.__getitem__, groups, job)
        assert leaf in section
        section[leaf] = yaml.safe_load(value)
    return job


@pytest.fixture
def before(tmp_path) -> dict:
    """What an earlier start wrote and a later one reads."""
    assert resolved.read(tmp_path) is None
    resolved.write(source(), tmp_path)
    found = resolved.read(tmp_path)
    assert found == source()
    return found


def test_two_spellings_of_one_path_are_one_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for written in ("~", "'~", str(tmp_path)):
        paths = [
            f"{key}={written}/{key}" + "'" * written.startswith("'")
            for key in ("parent.path", "data.train", "data.validation", "run_dir")
        ]
        (job,) = compose(["experiment=tinystories", *paths])
        resolved.refuse_other(job, resolved.read(tmp_path), tmp_path)
        resolved.write(job, tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("run_dir=/elsewhere",),
        ("tracking.wandb.mode=disabled", "tracking.wandb.project=other", "tracking.wandb.name=x"),
        ("engine.replicas=2",),
        ("stages.ratios=[1.5,2,3]",),
        ("stages.ratios=[1.5,2,3]", "stages.tokens=[100000,100000,50000]"),
        ("stages.tokens=null", "stages.total_tokens=200000"),
        ("data.skip_bad=true",),
        ("parent.revision=main",),
    ],
    ids=lambda overrides: ",".join(overrides) or "same",
)
def test_what_may_differ(before, tmp_path, overrides):
    resolved.refuse_other(source(*overrides), before, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("parent.path=q",), ["parent.path ('p' there, 'q' now)"]),
        (("data.train=u", "data.seq_len=64"), ["data.seq_len (256 there, 64 now)", "data.train ('t' there, 'u' now)"]),
        (("seed=1",), ["seed (0 there, 1 now)"]),
        (("optimizer.betas=[0.9,0.99]",), ["optimizer.betas ([0.9, 0.95] there, [0.9, 0.99] now)"]),
        (("engine.dtype=bf16",), ["engine.dtype"]),
        (("linears.exclude=[a]",), ["linears.exclude"]),
        (("stages.ratios=[1.5]",), ["stages (ratios and tokens"]),
        (("stages.ratios=[1.25,2]",), ["stages (ratios and tokens"]),
        (("stages.ratios=[1.25,1.5,2]",), ["stages (ratios and tokens"]),
        (("stages.tokens=[100000,50000]",), ["stages (ratios and tokens"]),
        (
            ("stages.ratios=[1.5,2,3]", "stages.tokens=null", "stages.total_tokens=200000"),
            ["stages (ratios and tokens"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_is_refused(before, tmp_path, overrides, named):
    with pytest.raises(UserError) as caught:
        resolved.refuse_other(source(*overrides), before, tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "\n" not in message
    said = message.partition("different: ")[2]
    assert all(part in said for part in named)
    assert said.count(" there, ") == len(named)  # and no key that does not differ


def test_a_new_run_dir_takes_anything(tmp_path):
    resolved.refuse_other(source(), None, tmp_path)
    assert resolved.pinned(source(), None) == source()


def test_the_revisions_of_the_start_are_kept_unless_others_are_asked_for(before):
    before["parent"]["revision"], before["data"]["revision"] = "a" * 40, "b" * 40
    again = resolved.pinned(source(), before)
    assert (again["parent"]["revision"], again["data"]["revision"]) == ("a" * 40, "b" * 40)
    assert resolved.pinned(source("parent.revision=v2"), before)["parent"]["revision"] == "v2"
    resolved.refuse_moved({"parent": "a" * 40, "data": "b" * 40}, before)
    resolved.refuse_moved({"parent": "c" * 40, "data": None}, None)
    with pytest.raises(UserError, match=f"data.revision: .*{'b' * 40}"):
        resolved.refuse_moved({"parent": "a" * 40, "data": "c" * 40}, before)


@pytest.mark.parametrize("content", ["a: [", "", "- 1", "experiment: x"])
def test_a_damaged_one_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "config.yaml")):
        resolved.refuse_other(source(), resolved.read(tmp_path), tmp_path)

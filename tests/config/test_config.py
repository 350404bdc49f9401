"""Composition and the schema: what experiments hold, and the one line that each mistake gives."""

import functools
from pathlib import Path

import pytest

from plrd_train.config.compose import CONF, compose
from plrd_train.config.schema import Config, from_mapping
from plrd_train.errors import UserError


def configured(*overrides: str) -> Config:
    (job,) = compose(overrides)
    return from_mapping(job)


TINY = ("experiment=tinystories", "parent.path=p", "data.train=t", "data.validation=v")


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_composes(experiment):
    given = TINY[1:] if experiment.startswith(("tinystories", "study_")) else ()
    config = configured(f"experiment={experiment}", *given)
    assert config.experiment == experiment and config.run_dir.startswith(f"runs/{experiment}")


@pytest.mark.parametrize(
    ("experiment", "parent"), [("mistral_7b", "mistralai/Mistral-7B-v0.1"), ("llama2_7b", "meta-llama/Llama-2-7b-hf")]
)
def test_the_7b_experiments_carry_the_papers_setting(experiment, parent):
    config = configured(f"experiment={experiment}")
    assert config.parent.path == parent and config.data.train == "cerebras/SlimPajama-627B"
    assert len(config.stages.ratios) == 4 and config.stages.ratios[-1] == 2.25
    assert config.stages.budgets() == (250_000_000,) * 4
    assert (config.recipe, config.factorizer.name, config.objective.name) == ("paper", "svd", "ce")


def test_overrides_reach_their_key():
    config = configured(
        *TINY,
        "stages.ratios=[1.5,3]",
        "stages.tokens=1e5",
        "recover.lr=1e-3",
        "run_dir=/tmp/x",
        "linears.exclude=[a, b]",
    )
    assert config.stages.ratios == (1.5, 3.0) and config.stages.budgets() == (100_000, 100_000)
    assert config.recover.lr == 1e-3 and config.run_dir == "/tmp/x" and config.linears.exclude == ("a", "b")


def test_total_tokens_are_split_by_growth():
    config = configured(
        *TINY, "stages.ratios=[1.5,2,3]", "stages.tokens=null", "stages.total_tokens=70000", "stages.growth=2"
    )
    assert config.stages.budgets() == (10_000, 20_000, 40_000)


def test_launchers_may_add_their_local_rank():
    assert configured("--local_rank=1", *TINY).experiment == "tinystories"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("run_dir=~/x",), {"run_dir": "/home/me/x"}),
        (("run_dir='~/with space/x'",), {"run_dir": "/home/me/with space/x"}),
        (("++run_dir=~",), {"run_dir": "/home/me"}),
        (
            ("data.train=~/a/*.jsonl", 'data.validation="~/b"'),
            {"data.train": "/home/me/a/*.jsonl", "data.validation": "/home/me/b"},
        ),
        (("parent.path=~root/p",), {"parent.path": f"{Path('~root').expanduser()}/p"}),
        (
            ("parent.path='~/p'", "run_dir='runs/${parent.path}'"),
            {"parent.path": "/home/me/p", "run_dir": "runs//home/me/p"},
        ),
        (("run_dir=${oc.env:PLACE}/x",), {"run_dir": "/home/me/there/x"}),
        (
            ("parent=scratch", "~parent.path", "++parent.path='${run_dir}/parent'", "run_dir='~/x'"),
            {"parent.path": "/home/me/x/parent"},
        ),
        (("parent=scratch", "parent.scratch.tokenizer=~/t"), {"parent.scratch.tokenizer": "/home/me/t"}),
        (("engine=zero3", "engine.nvme_path='~/disk'"), {"engine.nvme_path": "/home/me/disk"}),
        (("data.train='${run_dir}/c'", "run_dir=~/x"), {"data.train": "/home/me/x/c"}),
        (("run_dir='./~x'", "data.train='a~/b'"), {"run_dir": "./~x", "data.train": "a~/b"}),
        (("tracking.wandb.name='~/x'",), {"tracking.wandb.name": "~/x"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_home_is_written_out_in_every_path(monkeypatch, overrides, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "~/there")
    (job,) = compose([*TINY, *overrides])
    assert {key: functools.reduce(dict.__getitem__, key.split("."), job) for key in expected} == expected


def test_home_is_written_out_in_the_lists_of_a_sweep(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    jobs = compose(["--multirun", *TINY, "data.train=~/a,/b,~/c", "run_dir='~/r-${seed}'", "seed=1"])
    assert [(job["data"]["train"], job["run_dir"]) for job in jobs] == [
        (path, "/home/me/r-1") for path in ("/home/me/a", "/b", "/home/me/c")
    ]


@pytest.mark.parametrize("override", ["run_dir=~nobody_such/x", "data.validation='~nobody_such/x'"])
def test_a_home_that_is_not_known_is_refused(override):
    with pytest.raises(UserError) as error:
        compose([*TINY, override])
    assert (
        str(error.value)
        == f"{override.partition('=')[0]}: ~nobody_such/x: ~nobody_such is no home folder that is known here; write "
        "the path out"
    )


def test_a_sweep_gives_one_config_a_point():
    assert [job["seed"] for job in compose(["--multirun", *TINY, "seed=1,2"])] == [1, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo=1", "foo: unknown key"),
        ("recover.lrr=1", "recover.lrr: unknown key; did you mean lr?"),
        ("engine.x=1", "engine.x: unknown key"),
        ("factorizer.calibration=1", "factorizer.calibration: unknown key"),
        ("recover.lr=fast", "recover.lr: Input should be a valid number"),
        ("recover.lr=0", "recover.lr: Input should be greater than 0"),
        ("recover.clip=true", "recover.clip: Input should be a valid number"),
        ("seed=1.5", "seed: Input should be a valid integer"),
        ("data.seq_len='64'", "data.seq_len: Input should be a valid integer"),
        ("data.seq_len=1", "data.seq_len: Input should be greater than or equal to 2"),
        ("stages.ratios=[0.5]", "stages.ratios: a ratio of 0.5 makes the model no smaller"),
        ("stages.ratios=[1.5,1.5]", "stages.ratios: 1.5 comes after 1.5: ratios must grow"),
        ("stages.ratios=[inf]", "stages.ratios"),
        ("stages.ratios=[2,1.25]", "stages.ratios: 1.25 comes after 2.0"),
        ("stages.tokens=[1e5]", "stages.tokens: 1 budgets for the 4 ratios"),
        ("stages.tokens=null", "stages.tokens: give either"),
        ("stages.total_tokens=1e6", "stages.tokens: give either"),
        ("stages.tokens=100", "stages.tokens: a stage of 100 tokens is less than one step"),
        ("recover.global_batch_tokens=10", "recover.global_batch_tokens: 10 is less than one sequence"),
        ("linears.include=['(']", "linears.include: '(' is no regular expression"),
        ("ranks.name=best", "ranks: there is no 'best'; choose one of energy, sensitivity, uniform"),
        ("ranks.tokens=100", "ranks.tokens: unknown key; there are multiple"),
        ("ranks.name=sensitivity", "ranks.tokens: this key is missing"),
        ("parent.attention=flash", "parent.attention: Input should be 'eager', 'sdpa' or 'flash_attention_2'"),
        (
            "parent.attention=flash_attention_2",
            "parent.attention: flash_attention_2 does not compute in float32; choose engine.dtype=bf16",
        ),
        ("engine.replicas=0", "engine: replicas is 0: it must be at least 1"),
        ("tracking.wandb.mode=on", "tracking.wandb.mode: Input should be 'offline', 'online' or 'disabled'"),
        ("factorizer=qr", "Could not find 'factorizer/qr'; Available options in 'factorizer': asvd; fisher"),
        ("parent=3", "group override must be a string"),
        ("parent.path=???", "parent.path: this key has no value yet"),
        ("parent.path=null", "parent.path: Input should be a valid string"),
    ],
)
def test_a_mistake_gives_one_line_that_names_the_key(override, message):
    with pytest.raises(UserError) as error:
        configured(*TINY, override)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("before", [True, False], ids=["flags first", "overrides first"])
def test_what_hydra_only_prints(capsys, before):
    flags, overrides = ["--cfg", "job", "--package", "run_dir"], ["experiment=quickstart", "seed=1"]
    assert compose(flags + overrides if before else overrides + flags) == []
    assert capsys.readouterr().out == "runs/quickstart\n"

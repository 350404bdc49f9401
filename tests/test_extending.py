"""The examples of docs/extending.md, as a package that is installed: each does in a run what the page says of it."""

import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from plug_in import install
from records import member
from safetensors.torch import load_file
from test_registry import run
from tiny_parents import VOCABULARY

from plrd_train.family import Family, Member, ParentRecord, Scores
from plrd_train.structure import Parameter

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
STEPS, PEAK = 20, 4e-3


def examples() -> dict[str, str]:
    """{path in the package: content} of each block of the page that has a title."""
    blocks = re.findall(r'(?ms)^```(?:python|yaml) title="([^"]+)"\n(.*?)^```$', PAGE.read_text())
    return dict(blocks)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    install(folder, files=examples())
    return folder


@pytest.fixture
def module(site, monkeypatch):
    """module("compress.methods.rms"): that module of the package."""
    monkeypatch.syspath_prepend(str(site))
    return lambda name: importlib.import_module(f"mine.{name}")


@pytest.fixture(scope="module")
def family(site, command, tmp_path_factory):
    """(folder, output) of a family made of all the examples at once."""
    folder = tmp_path_factory.mktemp("family")
    chosen = (
        *("form=unit", "factorizer=rms", "factorizer.calibration_tokens=64", "ranks=even"),
        *("objective=smooth", "objective.smoothing=1.0", "schedule=rsqrt", "schedule.warmup_steps=4"),
        *("optimizer=adam", "optimizer.weight_decay=0.01"),
        *("engine=telling", "engine.dtype=fp32", "engine.prefix=holds"),
        *("evaluation=[perplexity,accuracy]", "evaluation.accuracy.documents=7"),
    )
    done = run(site, "plrd_train", *command(folder, *chosen, "stages.ratios=[2]", "evaluation.tokens=500"))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_form_stores_columns_of_length_1(family):
    member = json.loads((family[0] / "family.json").read_text())["members"][0]
    stored = load_file(family[0] / member["path"] / "model.plrd.safetensors")
    assert member["form"] == "unit" and member["ranks"]
    for name, rank in member["ranks"].items():
        torch.testing.assert_close(stored[f"{name}.up.weight"].norm(dim=0), torch.ones(rank))


def test_the_allocation_gives_all_one_rank_and_keeps_the_ratio(family):
    member = json.loads((family[0] / "family.json").read_text())["members"][0]
    (rank,) = set(member["ranks"].values())
    assert member["ratio"] >= 2
    assert member["ratio"] * rank / (rank + 1) < 2  # one more would be too many


def test_the_schedule_is_one_over_the_root_of_the_step(family):
    rows = map(json.loads, (family[0] / "metrics.jsonl").read_text().splitlines())
    expected = [PEAK * (step / 4 if step < 4 else 2 / math.sqrt(step)) for step in range(1, STEPS + 1)]
    assert [row["train/lr"] for row in rows] == pytest.approx(expected)


def test_the_objective_is_least_where_all_tokens_are_alike(family):
    losses = [json.loads(row)["train/loss"] for row in (family[0] / "metrics.jsonl").read_text().splitlines()]
    assert min(losses) >= math.log(VOCABULARY) - 1e-5 and losses[-1] < losses[0]


def test_the_engine_tells_what_a_rank_holds(family):
    params = json.loads((family[0] / "family.json").read_text())["members"][0]["params"]
    assert f"holds rank 0: {params} of {params} parameters" in family[1]


def test_the_evaluator_measures_parent_and_member_on_the_same_tokens(family):
    found = json.loads((family[0] / "family.json").read_text())
    parent, member = (entry["eval"]["accuracy"] for entry in (found["parent"], *found["members"]))
    assert parent["tokens"] == member["tokens"] > 0
    assert 0 <= parent["accuracy"] <= 1 and 0 <= member["accuracy"] <= 1


def test_the_command_finds_the_smallest_member(site, tmp_path):
    ppl = {"1.25x": (700, 10.5), "1.5x": (500, 11.9), "2x": (300, 12.1)}
    family = Family(tmp_path, ParentRecord(path="p", params=900, eval=Scores(ppl=10.0)))
    family.members = [
        Member(**member(name, params=params, eval=Scores(ppl=value, nll_tokens=5)))
        for name, (params, value) in ppl.items()
    ]
    family.write()
    done = run(site, "plrd_train.cli", "best", tmp_path, "--within", "1.2", "--json")
    assert json.loads(done.stdout) == {"name": "1.5x", "params": 500}
    refused = run(site, "plrd_train.cli", "best", tmp_path, "--within", "1")
    assert refused.returncode == 2 and "--within: no member" in refused.stderr


def test_the_statistic_is_the_mean_square(module):
    statistic, x = module("compress.statistics.squares"), torch.randn(30, 5)
    total, count = torch.zeros(5), 0
    for part in (x[:12], x[12:]):
        count += statistic.add(total, part, torch.empty(0))
    torch.testing.assert_close(statistic.mean(total, count), (x * x).mean(0))


def test_the_method_is_best_in_its_norm(module):
    weight, squares = torch.randn(12, 8), torch.rand(8) + 0.1
    cut = module("compress.methods.rms").Method(64, 1.0).dense(weight, squares).cut(3)
    error = torch.linalg.norm((weight - cut.up @ cut.down) * squares.sqrt())
    values = torch.linalg.svdvals(weight * squares.sqrt())
    torch.testing.assert_close(error, values[3:].norm(), rtol=1e-3, atol=0)


def test_the_optimizer_steps_by_the_rate_at_first_and_leaves_refused_steps_out(module):
    optimizer = module("recover.optimizers.adam").Optimizer(betas=(0.9, 0.95), weight_decay=0.0)
    matrix = Parameter("w", (2, 3), "", "")
    weight = torch.nn.Parameter(torch.randn(2, 3))
    opened = optimizer.open([{"params": [weight], **optimizer.group(matrix).options}], None)
    opened.param_groups[0]["lr"] = 0.1
    before, weight.grad = weight.detach().clone(), torch.randn(2, 3)
    opened.found_inf = torch.tensor(1.0)
    opened.step()
    assert torch.equal(weight, before)
    opened.found_inf = torch.tensor(0.0)
    opened.step()  # both moments are those of this gradient, corrected for their beginning
    torch.testing.assert_close(weight.detach(), before - 0.1 * weight.grad.sign(), rtol=0, atol=1e-4)
    assert set(opened.state[weight]) - {"step"} == set(optimizer.group(matrix).state)


def test_the_package_of_the_page_has_its_entry_point():
    import tomllib

    (text,) = re.findall(r'(?ms)^```toml title="pyproject.toml"\n(.*?)^```$', PAGE.read_text())
    assert tomllib.loads(text)["project"]["entry-points"] == {"plrd_train": {"mine": "mine"}}

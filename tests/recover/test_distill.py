"""`objective=distill`: its terms against two models in plain PyTorch, and the parent as a teacher on each engine."""

import json
import math

import pytest
import torch
from processes import run_job
from transformers import AutoModelForCausalLM

from plrd_train.recover.objectives.distill import Objective


def test_the_terms_are_those_of_two_models(save_parent, tokens):
    folder, student = save_parent("llama")
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        made, wanted = (model(tokens).logits[:, :-1].double() for model in (student, teacher))
        terms = Objective(ce=0.25, temperature=2.0).open(lambda: teacher)(student, tokens)
    target = (wanted / 2).softmax(-1)
    kl = (target * (target.log() - (made / 2).softmax(-1).log())).sum()
    ce = -made.log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum()
    assert terms["kl"].item() == pytest.approx(0.75 * 4 * kl.item(), rel=1e-4)
    assert terms["ce"].item() == pytest.approx(0.25 * ce.item(), rel=1e-5)


def test_no_gradient_reaches_the_teacher(save_parent, tokens):
    folder, student = save_parent("llama")
    teacher = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    sum(Objective(ce=0.0, temperature=1.0).open(lambda: teacher)(student, tokens).values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    # The two are the same model, where the divergence is at its minimum.
    assert all(parameter.grad.abs().max() < 1e-3 for parameter in student.parameters())


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_the_parent_teaches_each_stage(command, tmp_path, engine):
    """At a ratio of 1, and no rank that is a multiple of 1000, the model begins as its parent. It diverges from it with
    the first step on the text."""
    settings = [f"engine={engine}", "stages.ratios=[1.0]", "ranks.multiple=1000", "stages.tokens=640"]
    distill = ["objective=distill", "objective.ce=0.5"]
    rows = {}
    for name, objective in {"ce": [], "distill": distill}.items():
        assert run_job(2, command(tmp_path / name, *settings, *objective)).status == 0
        rows[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    first, *others = rows["distill"]
    assert first["train/loss/kl"] == pytest.approx(0.0, abs=1e-5)
    assert first["train/loss/ce"] == pytest.approx(rows["ce"][0]["train/loss"] / 2, rel=1e-5)
    assert len(others) == 4 and all(row["train/loss/kl"] > 1e-4 for row in others)
    assert all(math.isclose(row["train/loss"], row["train/loss/kl"] + row["train/loss/ce"]) for row in others)
    assert not any("train/loss/ce" in row for row in rows["ce"])
    two = ["stages.ratios=[1.25,1.6]", "stages.tokens=256", "evaluation.tokens=500", f"engine={engine}", *distill]
    assert run_job(2, command(tmp_path / "two", *two)).status == 0  # a teacher for each stage
    stages = [json.loads(line)["stage/index"] for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert stages == [1, 1, 2, 2]


def test_a_parent_from_scratch_has_no_teacher(command, tiny, tmp_path):
    scratch = ["parent=scratch", f"parent.path={tmp_path / 'p'}", f"parent.scratch.tokenizer={tiny / 'parent'}"]
    ended = run_job(1, command(tmp_path, *scratch, "objective=distill"))
    assert ended.status == 2 and "objective: a parent that is trained from scratch has no parent" in ended.err

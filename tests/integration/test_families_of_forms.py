"""A whole family of another form than the pair of factors: on both engines, killed and resumed, published and gone on
from."""

import json

import pytest
import torch
from faults import kill_before
from plain import perplexity
from processes import run_job
from safetensors.torch import load_file
from test_restart import STEPS, finish, records, same_members
from tiny_family import write_parent
from transformers import AutoModelForCausalLM, AutoTokenizer

import plrd_train  # noqa: F401, members load after it
from plrd_train.compress import forms

SETTINGS = (
    f"stages.tokens={STEPS * 128}",
    "form=pifa",
    "factorizer=whitened",
    "factorizer.calibration_tokens=512",
    "ranks=energy",
    "evaluation.tokens=500",
)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_family_of_pifa_killed_in_training_and_in_publishing_ends_as_if_it_had_not_been(
    command, tiny, tmp_path, engine
):
    settings = (*SETTINGS, f"engine={engine}")
    finish(2, command(tmp_path / "whole", *settings))
    run_dir = tmp_path / "run"
    for where, call in (
        ("plrd_train.tracking.tracker:Tracker.log", STEPS + 2),
        ("plrd_train.publish.members:_ShardWriter.close", 0),
    ):
        assert run_job(2, command(run_dir, *settings, "checkpoint.tokens=256"), kill_before, where, call).status != 0, (
            where
        )
    finish(2, command(run_dir, *settings))
    assert same_members(run_dir, tmp_path / "whole")
    (family, found, _), (expected, wanted, _) = records(run_dir), records(tmp_path / "whole")
    assert family == expected and found == wanted

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "members/1.6x")
    for entry in family["members"]:
        assert entry["form"] == "pifa" and entry["ratio"] >= entry["ratio_requested"]
        model = AutoModelForCausalLM.from_pretrained(run_dir / entry["path"])
        kinds = {name: type(model.get_submodule(name)) for name in entry["ranks"]}
        assert set(kinds.values()) == {forms.get("pifa").Linear}
        assert {name: model.get_submodule(name).basis.out_features for name in kinds} == entry["ranks"]
        assert entry["params"] == sum(parameter.numel() for parameter in model.parameters())
        measured, predicted = perplexity(model, tokenizer, tiny / "corpus" / "validation", context=256, tokens=500)
        assert entry["eval"] == {**entry["eval"], "ppl": pytest.approx(measured, rel=1e-4), "nll_tokens": predicted}


def test_on_another_number_of_ranks_and_in_bf16(command, tiny, tmp_path):
    write_parent(tmp_path / "parent", "qwen2", torch.bfloat16)  # with biases
    arguments = command(tmp_path / "run", *SETTINGS, f"parent.path={tmp_path / 'parent'}")
    assert (
        run_job(
            2, [*arguments, "checkpoint.tokens=256"], kill_before, "plrd_train.tracking.tracker:Tracker.log", STEPS + 2
        ).status
        != 0
    )
    finish(3, arguments)
    family = json.loads((tmp_path / "run" / "family.json").read_text())
    assert [member["world_size"] for member in family["members"]] == [2, 3]
    entry = family["members"][1]
    stored = load_file(tmp_path / "run" / entry["path"] / "model.plrd.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.int32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / entry["path"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / entry["path"])
    measured, _ = perplexity(model, tokenizer, tiny / "corpus" / "validation", context=256, tokens=500)
    assert entry["eval"]["ppl"] == pytest.approx(measured, rel=1e-4)  # of the weights as published, not as trained


@pytest.mark.parametrize(
    ("form", "dtype", "later"),
    [
        ("pifa", torch.float32, (("pifa", "refined"), ("lowrank", "svd"), ("pifa", "fisher"))),
        ("int8", torch.bfloat16, (("lowrank", "svd"),)),
    ],
)
def test_a_member_of_a_form_is_a_parent(plrd_json, tiny, tmp_path, form, dtype, later):
    """Its pairs are read again, and go on to a lower rank in either form."""
    write_parent(tmp_path / "parent", dtype=dtype)
    text = ("--calibration", tiny / "corpus", "--data", tiny / "corpus", "data.seq_len=16")
    text += ("factorizer.calibration_tokens=512",)
    chosen = ("--method", "whitened", "--form", form, "--ratio", "1.25")
    first = plrd_json("factor", tmp_path / "parent", tmp_path / "first", *chosen, *text)
    member, eval_first = tmp_path / "first/members/1.25x", first["members"][0]["eval"]["ppl"]
    assert plrd_json("evaluate", member, "--data", tiny / "corpus")["ppl"] == pytest.approx(eval_first, rel=1e-6)
    for other, method in later:
        given = text if method != "svd" else text[2:5]
        chosen = ("--method", method, "--form", other, "--ratio", "2")
        made = plrd_json("factor", member, tmp_path / method, *chosen, *given)
        (entry,) = made["members"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / method / "members/2x")
        assert made["parent"]["eval"]["ppl"] == pytest.approx(eval_first, rel=1e-5)
        assert entry["form"] == other and entry["params"] == sum(parameter.numel() for parameter in model.parameters())
        assert entry["ratio"] >= 2

"""Parents of several architectures and dtypes through a whole stage: what is published is what plain transformers
computes from its factors."""

import json

import pytest
import torch
from plain import perplexity
from processes import run_job
from safetensors.torch import load_file
from tiny_family import write_parent
from transformers import AutoModelForCausalLM, AutoTokenizer

import plrd_train  # noqa: F401, members load after it


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("mistral", torch.bfloat16), ("qwen2", torch.float32), ("gemma", torch.float16), ("gpt_neox", torch.float32)],
)
def test_a_stage_from_end_to_end(command, tiny, tokens, tmp_path, architecture, dtype):
    write_parent(tmp_path / "parent", architecture, dtype)
    run_dir = tmp_path / "run"
    ended = run_job(
        2,
        command(
            run_dir,
            f"parent.path={tmp_path / 'parent'}",
            "stages.ratios=[1.5]",
            "stages.tokens=512",
            "evaluation.tokens=500",
        ),
    )
    assert (ended.status, ended.err) == (0, "")
    (entry,) = json.loads((run_dir / "family.json").read_text())["members"]
    folder = run_dir / entry["path"]
    stored = load_file(folder / "model.plrd.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}

    # The dense model that its factors multiply out to.
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            module, _, leaf = name.rpartition(".")
            if module in entry["ranks"]:
                up, down = stored[f"{module}.up.weight"].float(), stored[f"{module}.down.weight"].float()
                assert down.shape[0] == entry["ranks"][module]
                parameter.copy_(up @ down if leaf == "weight" else stored[f"{module}.up.bias"].float())
            else:
                parameter.copy_(stored[name].float())
    member = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(member(tokens).logits, dense.eval()(tokens).logits, rtol=0, atol=1e-4)
    expected, predicted = perplexity(
        dense, AutoTokenizer.from_pretrained(folder), tiny / "corpus" / "validation", context=256, tokens=500
    )
    assert entry["eval"] == {**entry["eval"], "ppl": pytest.approx(expected, rel=1e-4), "nll_tokens": predicted}
    assert entry["params"] == sum(parameter.numel() for parameter in member.parameters())
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype

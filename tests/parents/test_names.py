"""What a checkpoint holds beside the model's own tensors, against what transformers' from_pretrained makes of it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from plrd_train.errors import UserError
from plrd_train.parents.models import HubArchitecture
from plrd_train.parents.parent import load_config, open_parent
from plrd_train.parents.published import find_published, open_published
from plrd_train.parents.weights import WeightReader


def add(folder, tensors, drop=(), rename=lambda name: name):
    file = folder / "model.safetensors"
    held = {rename(name): tensor for name, tensor in load_file(file).items() if name not in drop}
    save_file(held | tensors, file, metadata={"format": "pt"})


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def as_transformers(folder):
    """(all parameters by name as transformers loads them, the names that it leaves out)."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return dict(model.named_parameters(remove_duplicate=False)), info["unexpected_keys"]


def assert_same_model(folder):
    """Every way to read a parent gives the parameters that transformers gives. Returns the parent."""
    expected, _ = as_transformers(folder)
    parent = open_parent(str(folder))
    reader = WeightReader(parent)
    model = HubArchitecture(load_config(parent)).build()
    assert {name for name, _ in model.named_parameters(remove_duplicate=False)} == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(reader.read(name), parameter), name
        assert torch.equal(
            open_published(find_published(str(folder)), torch.float32).model.get_parameter(name), parameter
        ), name
    return parent


ONE = torch.ones(1)
LEFT_OUT = {
    "rotary frequencies": (
        "llama",
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)},
        2,
    ),
    "masks": (
        "gpt_neox",
        {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8), "gpt_neox.layers.1.attention.masked_bias": ONE},
        2,
    ),
    "value head": ("mistral", {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": ONE}, 2),
    "prediction of further tokens": (
        "llama",
        {"mtp.layers.0.proj.weight": torch.ones(4, 4), "model.mtp.norm.weight": ONE},
        2,
    ),
    "whole numbers": ("llama", {"model.embed_positions.position_ids": torch.arange(4)}, 1),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_the_model_has_no_place_for_is_left_out_and_told_once(save_parent, case):
    architecture, tensors, count = LEFT_OUT[case]
    folder, _ = save_parent(architecture)
    add(folder, tensors)
    parent = assert_same_model(folder)
    (note,) = parent.notes
    assert note.startswith(f"{count} stored tensor") and parent.weights.keys().isdisjoint(tensors)
    assert all(part in note for part in ("left out", next(iter(tensors)).rpartition(".")[2]))
    _, unexpected = as_transformers(folder)
    assert unexpected <= tensors.keys()


def test_in_a_checkpoint_of_the_bare_model_as_well(save_parent):
    folder, _ = save_parent("llama_tied_scaled_rope")
    add(
        folder,
        {"layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)},
        rename=lambda name: name.removeprefix("model."),
    )
    assert len(assert_same_model(folder).notes) == 1
    add(folder, {"layers.0.mlp.up_proj.weight_scale": ONE})
    with pytest.raises(UserError, match=r"holds layers\.\*\.mlp\.up_proj\.weight_scale beside weights of the model"):
        open_parent(str(folder))


def test_layers_that_config_json_does_not_count_are_told(save_parent):
    folder, _ = save_parent("llama")
    edit(folder, num_hidden_layers=1)
    parent = assert_same_model(folder)
    assert (
        parent.notes[0] == "config.json counts 1 layers, the weights hold 2: those from model.layers.1 on are left out"
    )
    assert not any("layers.1" in name for name in parent.weights)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.weight_scale_inv",
        "model.layers.1.self_attn.q_proj.qzeros",
        "model.layers.1.self_attn.q_proj.bias",  # which config.json does not know
        "model.layers.0.mlp.up_proj.lora_A.default.weight",
        "model.layers.0.mlp.up_proj.weight.absmax",
        "model.norm.bias",
        "lm_head.weight_scale",
    ],
)
def test_what_changes_a_weight_is_never_left_out(save_parent, plrd, name):
    folder, _ = save_parent("llama")
    add(folder, {name: ONE})
    with pytest.raises(
        UserError,
        match=r"model\.safetensors: holds .* beside weights of the model, .*; give the unquantized, merged model",
    ):
        open_parent(str(folder))
    status, _, err = plrd("generate", folder, "--prompt", "w3")
    assert status == 2 and err.count("\n") == 1


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int8, torch.uint8, torch.bool]
)
def test_weights_of_a_dtype_that_needs_more_are_refused(save_parent, dtype):
    folder, model = save_parent("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    add(folder, {name: model.get_parameter(name).detach().to(dtype)})
    with pytest.raises(
        UserError, match=rf"{name} is stored as {str(dtype).removeprefix('torch.')}; give the unquantized model"
    ):
        WeightReader(open_parent(str(folder)))


# Heads


def test_a_head_of_its_own_counts_although_config_json_ties_it(save_parent, plrd_json, tiny, tmp_path):
    folder, _ = save_parent("llama_tied_scaled_rope")
    head = torch.randn(64, 32)
    add(folder, {"lm_head.weight": head})
    parent = assert_same_model(folder)
    assert parent.own_head and torch.equal(WeightReader(parent).read("lm_head.weight"), head)
    assert "lm_head.weight of other values" in parent.notes[-1]
    plrd_json("factor", folder, tmp_path / "out", "--method", "svd", "--ratio", "1.25")
    member = AutoModelForCausalLM.from_pretrained(tmp_path / "out/members/1.25x", trust_remote_code=True)
    assert torch.equal(member.lm_head.weight, head)
    assert not torch.equal(member.get_input_embeddings().weight, head)
    measured = [
        plrd_json("evaluate", path, "--data", tiny / "corpus", "--tokens", 300)["ppl"]
        for path in (folder, tmp_path / "out/members/1.25x")
    ]
    assert measured[0] != measured[1]


def test_one_head_under_two_names_stays_tied(save_parent):
    folder, model = save_parent("llama_tied_scaled_rope")
    add(folder, {"lm_head.weight": model.get_input_embeddings().weight.detach().clone()})
    parent = assert_same_model(folder)
    assert not parent.own_head and parent.notes == []


def test_a_head_without_embeddings_beside_it_is_both(save_parent):
    folder, model = save_parent("llama_tied_scaled_rope")
    add(
        folder,
        {"lm_head.weight": model.get_input_embeddings().weight.detach().clone()},
        drop=["model.embed_tokens.weight"],
    )
    assert not assert_same_model(folder).own_head


def test_a_longer_head_is_refused(save_parent):
    folder, _ = save_parent("llama_tied_scaled_rope")
    add(folder, {"lm_head.weight": torch.randn(72, 32)})
    with pytest.raises(UserError, match=r"lm_head\.weight has shape \(72, 32\), but config\.json asks for \(64, 32\)"):
        WeightReader(open_parent(str(folder)))


# Switches and adapters

SHORT = ("data.seq_len=16", "factorizer.calibration_tokens=256")


@pytest.mark.parametrize(
    "switches",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flex_attention"},
        pytest.param({"return_dict": False}, marks=pytest.mark.slow),  # also the last of these
        {"output_hidden_states": True, "output_attentions": True},
        {"use_cache": False, "return_dict": False},
    ],
)
def test_how_to_run_is_not_for_config_json_to_say(save_parent, plrd_json, tiny, tmp_path, switches):
    folder, _ = save_parent("llama")
    before = plrd_json("evaluate", folder, "--data", tiny / "corpus", "--tokens", 300)
    edit(folder, **switches)
    assert plrd_json("evaluate", folder, "--data", tiny / "corpus", "--tokens", 300) == before
    plrd_json(
        "factor",
        folder,
        tmp_path / "out",
        "--method",
        "whitened",
        "--ratio",
        "1.5",
        "--calibration",
        tiny / "corpus",
        *SHORT,
    )
    kept = json.loads((tmp_path / "out/members/1.5x/config.json").read_text())
    assert kept.get("return_dict", True) and kept.get("use_cache", True) and not kept.get("output_hidden_states")
    assert plrd_json("generate", tmp_path / "out/members/1.5x", "--prompt", "w3 w4", "--max-tokens", 3)["text"]


def test_an_adapter_beside_the_weights_is_told_and_alone_refused(save_parent, plrd):
    folder, _ = save_parent("llama")
    (folder / "adapter_config.json").write_text("{}")
    assert (
        "the adapter is left out" in open_parent(str(folder)).notes[-1]
        and "merge_and_unload" in open_parent(str(folder)).notes[-1]
    )
    status, out, err = plrd("generate", folder, "--prompt", "w3", "--max-tokens", 1, "--json")
    assert (status, err.count("note: adapter_config.json lies beside the weights")) == (0, 1)
    assert json.loads(out)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json; merge this adapter into its base model: peft"):
        open_parent(str(folder))


@pytest.mark.parametrize("architectures", [None, ["Gemma3ForConditionalGeneration"]])
def test_a_model_that_sees_is_refused_before_any_work(save_parent, architectures):
    folder, _ = save_parent("llama")
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "architectures": architectures})
    )
    with pytest.raises(UserError, match=r"config\.json: Gemma3.* is not a causal LM"):
        open_parent(str(folder))

"""Reading rows of safetensors against the tensors that were written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parents import save_tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig

from plrd_train.errors import UserError
from plrd_train.parents.parent import Parent, open_parent
from plrd_train.parents.weights import WeightReader, parent_dtype


def test_rows_equal_those_of_the_model(save_parent):
    folder, model = save_parent("qwen2", max_shard_size=15_000)
    reader = WeightReader(open_parent(str(folder)))
    assert len(list(folder.glob("*.safetensors"))) > 2
    for name, parameter in model.named_parameters():
        assert reader.shape(name) == parameter.shape and reader.dtype(name) is torch.float32
        half, rows = parameter.shape[0] // 2, parameter.shape[0]
        assert torch.equal(reader.read(name), parameter)
        assert torch.equal(
            torch.cat([reader.read(name, slice(0, half)), reader.read(name, slice(half, rows))]), parameter
        )
        # The share of a rank beyond the last row.
        assert reader.read(name, slice(rows, rows)).shape == (0, *parameter.shape[1:])


def test_tied_weight_is_found_under_both_names(save_parent):
    folder, model = save_parent("gemma")
    reader = WeightReader(open_parent(str(folder)))
    assert torch.equal(reader.read("lm_head.weight", slice(3, 9)), model.get_input_embeddings().weight[3:9])


def test_checkpoint_of_the_bare_model_is_read(save_parent):
    folder, model = save_parent("gpt_neox")
    model.base_model.save_pretrained(folder)
    json_file = folder / "config.json"
    json_file.write_text(json.dumps(json.loads(json_file.read_text()) | {"architectures": ["GPTNeoXForCausalLM"]}))
    reader = WeightReader(open_parent(str(folder)))
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    assert name.removeprefix("gpt_neox.") in load_file(folder / "model.safetensors")
    assert torch.equal(reader.read(name), model.get_parameter(name))


def test_fused_experts_are_refused_with_the_mend(tmp_path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_local_experts=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    name = next(name for name, _ in model.named_parameters() if "experts" in name)
    with pytest.raises(UserError, match="save_original_format=False"):
        WeightReader(open_parent(str(tmp_path))).read(name)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert torch.equal(WeightReader(open_parent(str(tmp_path))).read(name), model.get_parameter(name))


def test_missing_tensor_is_one_line(save_parent):
    reader = WeightReader(open_parent(str(save_parent("llama")[0])))
    with pytest.raises(UserError, match=r"llama: its weights lack model\.layers\.9") as error:
        reader.read("model.layers.9.mlp.up_proj.weight")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight_names_tensor_and_file(save_parent, bad):
    folder, _ = save_parent("llama")
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][5, 3] = bad
    save_file(tensors, file, metadata={"format": "pt"})
    reader = WeightReader(open_parent(str(folder)))
    assert reader.read(name, slice(0, 5)).isfinite().all()
    with pytest.raises(UserError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        reader.read(name)


def test_dtype_is_that_of_most_numbers(tmp_path):
    tensors = {
        "a": torch.zeros(9, 9, dtype=torch.bfloat16),
        "b": torch.zeros(3),
        "c": torch.zeros(4),
        "scalar": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert parent_dtype(Parent("p", None, str(tmp_path), dict.fromkeys(tensors, "model.safetensors"))) is torch.bfloat16


def test_file_of_another_machine_is_one_line(save_parent):
    parent = open_parent(str(save_parent("llama")[0]))
    (Path(parent.folder) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not on this machine"):
        WeightReader(parent)

"""Models built on the meta device and filled by hand against plain transformers."""

from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_parents import CONFIGS
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from plrd_train.errors import UserError
from plrd_train.parents.models import build_model, check_attention, refill_buffers
from plrd_train.parents.parent import load_config, open_parent
from plrd_train.parents.weights import WeightReader


def on_meta(parent, ranks=None, attention=None):
    with torch.device("meta"):
        return build_model(load_config(parent), ranks, attention).eval()


def materialize(model, parent):
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
        reader = WeightReader(parent)
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name))
    refill_buffers(model)
    return model


@pytest.mark.parametrize("architecture", CONFIGS)
def test_meta_build_gives_the_logits_of_from_pretrained(architecture, save_parent, tokens):
    folder, _ = save_parent(architecture)
    model = materialize(on_meta(parent := open_parent(str(folder))), parent)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model) is type(expected) and model.dtype is torch.float32
    assert (
        model.config._attn_implementation
        == expected.config._attn_implementation
        == ("eager" if architecture == "gemma2" else "sdpa")
    )
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, atol=1e-6, rtol=0)


def test_real_parent_gives_the_logits_of_from_pretrained(assets):
    folder = assets / "parents" / "stories3m"
    model = materialize(on_meta(parent := open_parent(str(folder))), parent)
    tokens = torch.arange(3, 131)[None]
    torch.testing.assert_close(
        model(tokens).logits, AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits, atol=1e-6, rtol=0
    )


def test_the_attention_asked_for_is_the_one_that_computes(save_parent, tokens):
    folder, _ = save_parent("llama")
    parent = open_parent(str(folder))
    model = materialize(on_meta(parent, attention="eager"), parent)
    assert all(layer.self_attn.config._attn_implementation == "eager" for layer in model.model.layers)
    # Which a fused kernel does not give.
    assert model(tokens, output_attentions=True).attentions[0].shape[-2:] == (12, 12)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available() and find_spec("flash_attn") is not None, reason="flash-attn works here")
def test_an_attention_that_cannot_be_used_is_refused(save_parent):
    config = load_config(open_parent(str(save_parent("llama")[0])))
    check_attention(config, "sdpa")
    with pytest.raises(
        UserError, match=r"^parent\.attention: flash_attention_2 cannot be used here \([^\n]*\); choose sdpa$"
    ):
        check_attention(config, "flash_attention_2")


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="needs a GPU and flash-attn"
)
def test_flash_attention_gives_the_logits_of_sdpa(save_parent, tokens):
    folder, _ = save_parent("llama")
    parent = open_parent(str(folder))
    fused, plain = (
        materialize(on_meta(parent, attention=name), parent).to("cuda", torch.bfloat16)
        for name in ("flash_attention_2", "sdpa")
    )
    torch.testing.assert_close(fused(tokens.cuda()).logits, plain(tokens.cuda()).logits, atol=0.05, rtol=0.05)


def test_config_given_to_build_model_is_left_alone(save_parent):
    folder, _ = save_parent("llama", max_shard_size=10_000)
    config = load_config(open_parent(str(folder)))
    before = config.to_json_string()
    with torch.device("meta"):
        build_model(config, {"model.layers.0.mlp.up_proj": 3})
    assert config.to_json_string() == before


def test_ranks_that_name_no_linear_are_refused(save_parent):
    parent = open_parent(str(save_parent("llama")[0]))
    for name in ("model.layers.7.mlp.up_proj", "model.norm"):
        with pytest.raises(ValueError, match=name):
            on_meta(parent, {name: 3})


def test_buffers_are_refilled_beside_sharded_parameters(save_parent, tokens):
    folder, model = save_parent("gemma3")
    expected, stored = model(tokens).logits, load_file(folder / "model.safetensors")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = on_meta(open_parent(str(folder)))
        # The embedding owns a buffer and a parameter.
        for module in (*sharded.model.layers, sharded.model.embed_tokens, sharded):
            fully_shard(module)
        sharded.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in sharded.named_parameters():
                parameter.to_local().copy_(stored[name])
            for buffer in sharded.buffers():
                buffer.fill_(torch.nan)
        refill_buffers(sharded)
        assert all(torch.equal(parameter.full_tensor(), stored[name]) for name, parameter in sharded.named_parameters())
        torch.testing.assert_close(sharded(tokens).logits, expected, atol=1e-6, rtol=0)
    finally:
        dist.destroy_process_group()


def test_buffer_that_the_architecture_does_not_recompute_is_named(save_parent):
    model = save_parent("llama")[1]
    model.model.layers[1].register_buffer("table", torch.ones(3), persistent=False)
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.table"):
        refill_buffers(model)

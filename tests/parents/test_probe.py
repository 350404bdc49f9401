"""What a forward on the meta device tells of an architecture, against real models that are run."""

import pytest
import torch
from tiny_parents import config_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from plrd_train.compress.blocks import blocks_of
from plrd_train.compress.surgery import eligible_linears, replace_linears
from plrd_train.errors import UserError
from plrd_train.parents.modeling_plrd import with_ranks
from plrd_train.parents.models import build_model, probe_of
from plrd_train.parents.reach import check_in_order, check_lengths, notes, shapes_of

FIXED = {
    "llama": set(),
    "gptj": set(),
    "falcon": set(),  # a class of its own, which computes as nn.Linear does
    "bloom": set(),  # reads weights in a branch that its settings rule out
    "mamba": {f"backbone.layers.{i}.mixer.{name}" for i in range(2) for name in ("x_proj", "dt_proj", "out_proj")},
    "rwkv": {f"rwkv.blocks.{i}.{name}" for i in range(7) for name in ("attention.output", "feed_forward.value")},
    "llama4": {"model.layers.1.feed_forward.router"},
    "bamba": {"model.layers.0.mamba.out_proj"},  # by its fused kernels alone
}
# Of these a forward on a CPU reads the weight.
READ_HERE = [
    ("mamba", "backbone.layers.0.mixer.dt_proj"),
    ("rwkv", "rwkv.blocks.0.attention.output"),
    ("llama4", "model.layers.1.feed_forward.router"),
]


def model_of(architecture):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(architecture))


def heads(model):
    return {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}


@pytest.mark.parametrize("architecture", FIXED)
def test_with_all_other_linears_replaced_a_model_still_runs_and_trains(architecture, tokens):
    model, fixed = model_of(architecture), probe_of(config_of(architecture)).fixed
    left = heads(model)
    assert {name for name in fixed if id(model.get_submodule(name)) not in left} == FIXED[architecture]
    chosen = [name for name, _ in eligible_linears(model, fixed=fixed)]
    assert chosen
    replace_linears(model, dict.fromkeys(chosen, 2))
    with torch.no_grad():
        assert model.eval()(input_ids=tokens).logits.isfinite().all()
        model.generate(tokens, max_new_tokens=2)  # by way of its cache
    if architecture != "rwkv":  # which has no backward on a CPU, dense either
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        assert all(model.get_submodule(name).down.weight.grad is not None for name in chosen)


def test_a_member_is_a_parent_whose_pairs_are_not_told_of():
    dense = model_of("llama")
    config = with_ranks(config_of("llama"), {name: 3 for name, _ in eligible_linears(dense)})
    assert probe_of(config).fixed == set() and notes(config, [2.0]) == []


@pytest.mark.parametrize(("architecture", "name"), READ_HERE)
def test_with_one_of_the_fixed_replaced_a_model_does_not_run(architecture, name, tokens):
    model = model_of(architecture).eval()
    replace_linears(model, {name: 2})
    with pytest.raises((AttributeError, IndexError, ValueError)):
        model.generate(tokens, max_new_tokens=2)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Named(nn.Linear):
    """A Linear by another name."""


def test_a_subclass_is_fixed_where_it_computes_otherwise(monkeypatch):
    real = build_model

    def patched(config, *arguments):
        model = real(config, *arguments)
        for kind, name in ((Halved, "q_proj"), (Named, "k_proj")):
            old = getattr(model.model.layers[0].self_attn, name)
            setattr(model.model.layers[0].self_attn, name, kind(old.in_features, old.out_features, bias=False))
        return model

    monkeypatch.setattr("plrd_train.parents.models.build_model", patched)
    monkeypatch.setattr("plrd_train.parents.models._PROBES", {})
    assert probe_of(config_of("llama")).fixed == {"model.layers.0.self_attn.q_proj"}


def longest(model, limit):
    """Whether the model itself reads so many tokens."""
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, limit), 3))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(
    "architecture", ["opt", "gptj", "codegen", "gpt_neo", "gpt2", "llama", "falcon", "bloom", "mamba"]
)
def test_a_table_of_positions_is_found_where_the_model_stops_at_its_end(architecture):
    config, model = config_of(architecture), model_of(architecture).eval()
    most = probe_of(config).positions
    assert most == (64 if architecture in ("opt", "gptj", "codegen", "gpt_neo", "gpt2") else None)
    assert longest(model, 64)
    assert longest(model, 65) == (most is None)


def test_too_many_tokens_are_refused_by_the_key():
    check_lengths(config_of("opt"), {"data.seq_len": 64}, "theirs")
    check_lengths(config_of("llama"), {"data.seq_len": 2048}, "theirs")  # it computes positions
    with pytest.raises(
        UserError,
        match=r"^data\.seq_len=65: theirs has position embeddings for 64 tokens; give data\.seq_len=64 or less$",
    ):
        check_lengths(config_of("opt"), {"data.seq_len": 65, "evaluation.context": 64}, "theirs")
    with pytest.raises(
        UserError,
        match=r"^data\.seq_len=128, evaluation\.context=256: .*give data\.seq_len=64 evaluation\.context=64 or less$",
    ):
        check_lengths(config_of("gptj"), {"data.seq_len": 128, "evaluation.context": 256}, "theirs")


@pytest.mark.parametrize("architecture", ["llama", "gptj", "bamba", "llama4", "bloom", "gpt2"])
def test_blocks_are_the_list_that_hidden_states_go_through(architecture, tokens):
    model = model_of(architecture).eval()
    hidden = []
    for block in blocks_of(model).values():
        block.register_forward_pre_hook(lambda module, given: hidden.append(given[0]))
    with torch.no_grad():
        expected = model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert len(hidden) == 2 and all(torch.equal(one, other) for one, other in zip(hidden, expected, strict=False))
    found = probe_of(config_of(architecture))
    assert found.unchained is None and list(found.outputs) == list(blocks_of(model))
    check_in_order(config_of(architecture), "rom", "theirs")


# A sparse attention whose later layers use the choice of earlier ones; a router that passes its state on; hidden states
# that the model itself changes; layers that are run several times; code that needs values.
UNCHAINED = {
    "glm_moe_dsa": "more of the blocks",
    "zaya": "more of the blocks",
    "openai-gpt": "other hidden states",
    "hrm_text": "called twice",
}


@pytest.mark.parametrize("model_type", [*UNCHAINED, "jetmoe"])
def test_methods_that_go_block_by_block_are_refused_where_more_than_hidden_states_is_passed_on(model_type):
    with pytest.raises(
        UserError, match=r"^factorizer=rom: goes block by block, which theirs does not allow .*choose svd,"
    ) as error:
        check_in_order(AutoConfig.for_model(model_type, num_hidden_layers=4), "rom", "theirs")
    assert UNCHAINED.get(model_type, "without values") in str(error.value)


def test_a_model_without_linears_is_told_what_holds_its_weights():
    with torch.device("meta"):
        model = build_model(config_of("gpt2"))
    with pytest.raises(
        UserError, match=r"^parent theirs: GPT2LMHeadModel has no nn\.Linear .*in Conv1D; choose another parent$"
    ):
        shapes_of(model, config_of("gpt2"), [".*"], [], "theirs", "lowrank")
    with torch.device("meta"):
        model = build_model(config_of("llama"))
    with pytest.raises(UserError, match=r"change linears\.include and linears\.exclude$"):
        shapes_of(model, config_of("llama"), ["none"], [], "theirs", "lowrank")


def test_the_share_that_can_be_reached_is_told_where_experts_hold_the_rest():
    assert notes(config_of("llama"), [1.25]) == []
    model = model_of("mixtral")
    linears = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    (line,) = notes(config_of("mixtral"), [1.5, 2])
    whole = [f"{total / (total - linears + linears / ratio):.3g}" for ratio in (1.5, 2)]
    assert (
        f"hold {linears / total:.1%} of all parameters; at 1.5 / 2x on them the whole model becomes "
        f"{' / '.join(whole)}x smaller" in line
    )
    assert line.index("experts.gate_up_proj (2)") < line.index("experts.down_proj (2)")  # the largest first
    assert any("router" in line for line in notes(config_of("llama4"), []))


def test_nothing_of_the_model_is_left_changed():
    before = build_model(config_of("llama"))
    probe_of(config_of("llama"))
    assert type(build_model(config_of("llama")).model.layers[0].self_attn.q_proj) is nn.Linear
    assert type(before.model.layers[0].self_attn.q_proj) is nn.Linear

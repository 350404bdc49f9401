"""Every engine on real gloo processes, against plain transformers and dense algebra."""

import copy
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from sharded import (
    OPTIMIZER,
    architecture,
    batches,
    empty,
    factor,
    go_on,
    live_bytes,
    load_saved,
    logits,
    opened,
    read_shards,
    save,
    shapes_of,
    train,
)
from tiny_parents import save_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from plrd_train.compress.contracts import DecompositionError
from plrd_train.compress.surgery import eligible_linears
from plrd_train.engine import rounded
from plrd_train.errors import UserError
from plrd_train.parents.models import HubArchitecture
from plrd_train.parents.parent import load_config, open_parent
from plrd_train.parents.weights import WeightReader
from plrd_train.recover import saved

ARCHITECTURES = ["llama", "llama_tied_scaled_rope", "mistral", "qwen2", "gemma", "gpt_neox"]
pytestmark = pytest.mark.parametrize("engine", ["fsdp", "zero3"])


def load_and_logits(world, name, folder, tokens):
    engine = opened(world, name, folder)
    return logits(engine, tokens), dict(engine.tensors()), engine.params()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sharded_parent_is_the_parent(save_parent, tokens, engine, architecture):
    folder, model = save_parent(architecture)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    results = run_ranks(3, load_and_logits, engine, folder, tokens)
    for found, _, params in results:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        assert params == model.num_parameters()
    for name, parameter in model.named_parameters():
        assert torch.equal(results[0][1][name], parameter)
    assert all(whole is None for whole in results[1][1].values())


def full_rank(world, name, folder, tokens):
    engine = opened(world, name, folder)
    before = logits(engine, tokens)
    first = {name: min(s.out_features, s.in_features) for name, s in shapes_of(engine).items()}
    factor(engine, folder, first)
    once = logits(engine, tokens)
    half = {name: rank - 8 for name, rank in first.items()}
    factor(engine, folder, half)
    products = {}
    for linear, shape in shapes_of(engine).items():
        assert shape.rank == half[linear]
        pair = [engine.gather(f"{linear}.{part}.weight", world.size - 1)() for part in ("up", "down")]
        products[linear] = pair[0] @ pair[1] if pair[0] is not None else None
    return before, once, products


@pytest.mark.parametrize(("architecture", "size"), [("mistral", 2), ("qwen2", 3), ("gpt_neox", 1)])
def test_factoring_at_full_rank_changes_nothing_and_lower_ranks_are_optimal(
    save_parent, tokens, engine, architecture, size
):
    folder, model = save_parent(architecture)
    results = run_ranks(size, full_rank, engine, folder, tokens)
    for before, once, _ in results:
        torch.testing.assert_close(once, before, rtol=0, atol=1e-4)
    for name, product in results[-1][2].items():
        weight = model.get_submodule(name).weight.detach().double()
        rank = min(weight.shape) - 8
        optimum = torch.linalg.svdvals(weight)[rank:].norm()
        assert (weight - product.double()).norm() <= 1.0005 * optimum


def nan_weight(world, name, folder):
    engine = opened(world, name, folder)
    shards = engine.snapshot()
    if world.rank == 1:
        shards["model.layers.1.mlp.up_proj.weight"].view(-1)[0] = torch.nan
    engine.restore(shards)
    try:
        factor(engine, folder, dict.fromkeys(shapes_of(engine), 4))
    except DecompositionError as error:
        return str(error)


def test_a_weight_with_nan_is_named_on_every_rank(save_parent, engine):
    folder, _ = save_parent("llama")
    for message in run_ranks(2, nan_weight, engine, folder):
        assert message == "model.layers.1.mlp.up_proj: weight holds NaN or Inf"


def trained(world, name, folder, data, micro, options):
    engine = opened(world, name, folder, **options)
    logits(engine, data[0])  # an evaluation before the training must leave nothing behind
    return train(engine, data, micro), dict(engine.tensors())


def plain_training(model, data):
    """The same in plain PyTorch on one process."""
    model = copy.deepcopy(model).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=OPTIMIZER.betas)
    norms = []
    for batch in data:
        model(input_ids=batch, labels=batch).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, dict(model.named_parameters())


@pytest.mark.parametrize(
    ("size", "micro", "options"),
    [(1, 3, {}), (2, 2, {"activation_checkpointing": True}), (3, 1, {})],
    ids=["1", "2-checkpointed", "3"],
)
def test_training_is_plain_adamw(save_parent, engine, size, micro, options):
    folder, model = save_parent("llama_tied_scaled_rope")
    data = batches(4, 12)
    norms, expected = plain_training(model, data)
    results = run_ranks(size, trained, engine, folder, data, micro, options)
    for found, _ in results:
        assert found == pytest.approx(norms, rel=1e-4)
    for name, parameter in expected.items():
        torch.testing.assert_close(results[0][1][name], parameter.detach(), rtol=0, atol=2e-4)


def test_bf16_products_keep_fp32_masters(save_parent, engine):
    folder, model = save_parent("llama")
    data = batches(3, 8)
    norms, _ = plain_training(model, data)
    found, tensors = run_ranks(2, trained, engine, folder, data, 2, {"dtype": "bf16"})[0]
    assert found == pytest.approx(norms, rel=0.1) and found != pytest.approx(norms, rel=1e-6)
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())


def masters(world, name, folder):
    engine = opened(world, name, folder, dtype="bf16")
    return dict(engine.tensors())


def test_bf16_products_begin_with_the_exact_weights(save_parent, engine):
    folder, model = save_parent("llama")
    found = run_ranks(2, masters, engine, folder)[0]
    assert all(torch.equal(found[name], parameter) for name, parameter in model.named_parameters())


def twice(world, name, folder, data):
    engine = opened(world, name, folder)
    before = engine.snapshot()
    first = train(engine, data)
    engine.restore(before)
    return first, train(engine, data)


def test_a_restored_model_trains_alike_with_a_fresh_optimizer(save_parent, engine):
    folder, _ = save_parent("llama")
    for first, second in run_ranks(2, twice, engine, folder, batches(3, 4)):
        assert first == second


def factored_and_saved(world, name, folder, target):
    engine = opened(world, name, folder)
    factor(engine, folder, dict.fromkeys(shapes_of(engine), 5))
    save(engine, target)
    return dict(engine.tensors())


def reloaded(world, name, folder, target):
    engine = opened(world, name, folder)
    load_saved(engine, architecture(folder, dict.fromkeys(shapes_of(engine), 5)), target)
    return dict(engine.tensors())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_checkpoints_are_exact_on_any_number_of_ranks(save_parent, tmp_path, engine, before, after):
    folder, _ = save_parent("llama_tied_scaled_rope")
    expected = run_ranks(before, factored_and_saved, engine, folder, tmp_path / "saved")[0]
    found = run_ranks(after, reloaded, engine, folder, tmp_path / "saved")[0]
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # No pickle.
    assert {path.suffix for path in Path(tmp_path / "saved").rglob("*") if path.is_file()} <= {".safetensors", ".json"}


def trained_on(world, name, folder, data, target):
    """Three steps, what a checkpoint holds of them in `target`, and three steps more."""
    engine = opened(world, name, folder)
    first = train(engine, data[:3])
    save(engine, target / "model")
    for part, shards in engine.state().items():
        saved.write(engine.sharded(shards), target / part, world)
    return first + go_on(engine, data[3:]), dict(engine.tensors())


def gone_on(world, name, folder, data, target):
    engine = opened(world, name, folder)
    train(engine, data[3:])  # a state that must not matter
    load_saved(engine, architecture(folder, {}), target / "model")
    state = {part: read_shards(engine, target / part) for part in ("exp_avg", "exp_avg_sq")}
    engine.start(OPTIMIZER, 3, state)
    again = engine.state()
    same = again.keys() == state.keys() and all(
        torch.equal(again[part][name], shard) for part, shards in state.items() for name, shard in shards.items()
    )
    return same, go_on(engine, data[3:]), dict(engine.tensors())


@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 3), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(save_parent, tmp_path, engine, before, after):
    folder, _ = save_parent("llama_tied_scaled_rope")
    data = batches(6, 6)
    norms, expected = run_ranks(before, trained_on, engine, folder, data, tmp_path)[0]
    results = run_ranks(after, gone_on, engine, folder, data, tmp_path)
    assert all(same for same, *_ in results)
    _, found, tensors = results[0]
    if before == after:
        assert found == norms[3:]
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert found == pytest.approx(norms[3:], rel=1e-4)
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=2e-4)


def published_logits(world, name, folder, tokens):
    engine = opened(world, name, folder)
    before = logits(engine, tokens)
    with rounded(engine, torch.bfloat16):
        inside = logits(engine, tokens)
    return before, inside, logits(engine, tokens)


def test_rounded_weights_are_those_that_are_published(save_parent, tokens, engine):
    folder, model = save_parent("qwen2")
    before, inside, after = run_ranks(2, published_logits, engine, folder, tokens)[1]
    with torch.no_grad():
        for parameter in model.parameters():  # not the buffers, which .bfloat16() would round too
            parameter.copy_(parameter.bfloat16())
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(inside, expected, rtol=0, atol=1e-5)
    assert torch.equal(before, after) and not torch.equal(before, inside)


def wrong_shape(world, name, folder):
    parent = open_parent(str(folder))
    config = load_config(parent)
    config.intermediate_size += 1
    try:
        empty(world, name).load(HubArchitecture(config), WeightReader(parent))
    except UserError as error:
        return str(error)


def test_weights_that_do_not_fit_the_config_are_named(save_parent, engine):
    folder, _ = save_parent("llama")
    (message,) = run_ranks(1, wrong_shape, engine, folder)
    assert "gate_proj.weight is (48, 32), but config.json makes it (49, 32)" in message


def test_members_read_back_in_plain_transformers_have_the_engines_logits(save_parent, tokens, engine):
    folder, _ = save_parent("mistral")
    found, *_ = run_ranks(2, load_and_logits, engine, folder, tokens)[0]
    with torch.no_grad():
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(folder)(input_ids=tokens).logits, found, rtol=0, atol=2e-5
        )


def restructured_four_times(world, name, folder, data, target):
    engine = opened(world, name, folder, activation_checkpointing=True)
    for ranks in (48, 40, 32, 24):
        factor(engine, folder, dict.fromkeys(shapes_of(engine), ranks))
        train(engine, data)
    held = live_bytes()
    save(engine, target)
    return held


def fresh(world, name, folder, data, target):
    engine = empty(world, name, activation_checkpointing=True)
    before = live_bytes()
    with torch.device("meta"):
        linears = [name for name, _ in eligible_linears(architecture(folder, {}).build())]
    load_saved(engine, architecture(folder, dict.fromkeys(linears, 24)), target)
    train(engine, data)
    return live_bytes(), before


def test_four_restructurings_hold_no_more_memory_than_a_fresh_start(tmp_path, engine):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "parent")
    save_tokenizer(tmp_path / "parent")
    data = batches(1, 4)
    held = run_ranks(2, restructured_four_times, engine, tmp_path / "parent", data, tmp_path / "saved")
    for after, (once, before) in zip(
        held, run_ranks(2, fresh, engine, tmp_path / "parent", data, tmp_path / "saved"), strict=True
    ):
        print(engine, after, once, before)
        assert before < once / 2  # what is measured is mostly the model
        assert after <= 1.1 * once

"""The FSDP2 engine on real gloo processes, against plain transformers and dense algebra."""

import copy
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from plrd_train.engine import AdamW
from plrd_train.engine.fsdp import Options, open_engine
from plrd_train.errors import UserError
from plrd_train.hub.models import HubArchitecture
from plrd_train.hub.parents import load_config, open_parent
from plrd_train.hub.weights import WeightReader
from plrd_train.lowrank.distributed import DecompositionError, decompose
from plrd_train.lowrank.factorizers.svd import Factorizer
from plrd_train.lowrank.ranks import Shape
from plrd_train.lowrank.surgery import eligible_linears

ARCHITECTURES = ["llama", "llama_tied_scaled_rope", "mistral", "qwen2", "gemma", "gpt_neox"]
OPTIMIZER = AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def opened(world, folder, **options):
    settings = {"dtype": "fp32", "replicas": 1, "activation_checkpointing": False, "compile": False} | options
    parent = open_parent(str(folder))
    engine = open_engine(Options(**settings), world)
    engine.load(HubArchitecture(load_config(parent)), WeightReader(parent))
    return engine


def shapes_of(engine):
    return {name: Shape.of(linear) for name, linear in eligible_linears(engine.model)}


def factored(engine, folder, ranks):
    factors = decompose(engine, shapes_of(engine), ranks, Factorizer())
    engine.rebuild(HubArchitecture(load_config(open_parent(str(folder))), ranks), factors)
    return factors


@torch.no_grad()
def logits(engine, tokens):
    engine.model.eval()
    return engine.model(input_ids=tokens).logits


def load_and_logits(world, folder, tokens, options):
    engine = opened(world, folder, **options)
    return logits(engine, tokens), {name: whole for name, whole in engine.tensors()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sharded_parent_is_the_parent(save_parent, tokens, architecture):
    folder, model = save_parent(architecture)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    results = run_ranks(3, load_and_logits, folder, tokens, {})
    for found, _ in results:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(results[0][1][name], parameter)
    assert all(whole is None for whole in results[1][1].values())


@pytest.mark.parametrize("options", [{"replicas": 2}, {"replicas": 4}], ids=["hsdp2x2", "replicated"])
def test_hybrid_sharding_loads_and_gathers_alike(save_parent, tokens, options):
    folder, model = save_parent("llama")
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    for found, _ in run_ranks(4, load_and_logits, folder, tokens, options):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def full_rank(world, folder, tokens, options):
    engine = opened(world, folder, **options)
    before = logits(engine, tokens)
    first = {name: min(s.out_features, s.in_features) for name, s in shapes_of(engine).items()}
    factored(engine, folder, first)
    once = logits(engine, tokens)
    half = {name: rank - 8 for name, rank in first.items()}
    factored(engine, folder, half)
    products = {}
    for name, shape in shapes_of(engine).items():
        assert shape.rank == half[name]
        pair = [engine.gather(f"{name}.{part}.weight", world.size - 1) for part in ("up", "down")]
        products[name] = pair[0] @ pair[1] if pair[0] is not None else None
    return before, once, products


@pytest.mark.parametrize(
    ("architecture", "size", "options"), [("mistral", 2, {}), ("qwen2", 3, {}), ("gpt_neox", 1, {}), ("llama", 4, {"replicas": 2})]
)
def test_factoring_at_full_rank_changes_nothing_and_lower_ranks_are_optimal(save_parent, tokens, architecture, size, options):
    folder, model = save_parent(architecture)
    results = run_ranks(size, full_rank, folder, tokens, options)
    for before, once, _ in results:
        torch.testing.assert_close(once, before, rtol=0, atol=1e-4)
    for name, product in results[-1][2].items():
        weight = model.get_submodule(name).weight.detach().double()
        rank = min(weight.shape) - 8
        optimum = torch.linalg.svdvals(weight)[rank:].norm()
        assert (weight - product.double()).norm() <= 1.0005 * optimum


def nan_weight(world, folder):
    engine = opened(world, folder)
    if world.rank == 1:
        engine.model.get_parameter("model.layers.1.mlp.up_proj.weight").to_local().data[0, 0] = torch.nan
    try:
        factored(engine, folder, dict.fromkeys(shapes_of(engine), 4))
    except DecompositionError as error:
        return str(error)


def test_a_weight_with_nan_is_named_on_every_rank(save_parent):
    folder, _ = save_parent("llama")
    for message in run_ranks(2, nan_weight, folder):
        assert message == "model.layers.1.mlp.up_proj: weight holds NaN or Inf"


def train(world, folder, batches, options):
    engine = opened(world, folder, **options)
    engine.start(OPTIMIZER)
    engine.model.train()
    norms = []
    for batch in batches:
        own = batch[world.rank :: world.size]
        nll = F.cross_entropy(engine.model(input_ids=own).logits[:, :-1].float().flatten(0, 1), own[:, 1:].flatten(), reduction="sum")
        engine.backward(nll * (world.size / batch[:, 1:].numel()))
        norms.append(engine.step(1e-2, 0.5).item())
    return norms, dict(engine.tensors())


def plain_training(model, batches):
    """The same in plain PyTorch on one process."""
    model = copy.deepcopy(model).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=OPTIMIZER.betas)
    norms = []
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, dict(model.named_parameters())


@pytest.mark.parametrize(
    ("size", "options"),
    [(1, {}), (2, {"activation_checkpointing": True}), (3, {}), (4, {"replicas": 2})],
    ids=["1", "2-checkpointed", "3", "hsdp2x2"],
)
def test_training_is_plain_adamw(save_parent, size, options):
    folder, model = save_parent("llama_tied_scaled_rope")
    batches = [torch.randint(3, 64, (12, 10), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    norms, expected = plain_training(model, batches)
    results = run_ranks(size, train, folder, batches, options)
    for found, _ in results:
        assert found == pytest.approx(norms, rel=1e-4)
    for name, parameter in expected.items():
        torch.testing.assert_close(results[0][1][name], parameter.detach(), rtol=0, atol=2e-4)


def test_bf16_products_keep_fp32_masters(save_parent):
    folder, model = save_parent("llama")
    batches = [torch.randint(3, 64, (8, 10), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    norms, _ = plain_training(model, batches)
    found, tensors = run_ranks(2, train, folder, batches, {"dtype": "bf16"})[0]
    assert found == pytest.approx(norms, rel=0.1) and found != pytest.approx(norms, rel=1e-6)
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())


def saved(world, folder, target):
    engine = opened(world, folder)
    factored(engine, folder, dict.fromkeys(shapes_of(engine), 5))
    engine.save(target)
    return dict(engine.tensors())


def reloaded(world, folder, target):
    engine = opened(world, folder)
    ranks = dict.fromkeys(shapes_of(engine), 5)
    engine.load_saved(HubArchitecture(load_config(open_parent(str(folder))), ranks), target)
    return dict(engine.tensors())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 2)])
def test_checkpoints_are_exact_on_any_number_of_ranks(save_parent, tmp_path, before, after):
    folder, _ = save_parent("llama_tied_scaled_rope")
    expected = run_ranks(before, saved, folder, tmp_path / "saved")[0]
    found = run_ranks(after, reloaded, folder, tmp_path / "saved")[0]
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list(Path(tmp_path / "saved").rglob("*.metadata"))  # no pickle


def rounded(world, folder, tokens):
    engine = opened(world, folder)
    before = logits(engine, tokens)
    with engine.rounded(torch.bfloat16):
        inside = logits(engine, tokens)
    return before, inside, logits(engine, tokens)


def test_rounded_weights_are_those_that_are_published(save_parent, tokens):
    folder, model = save_parent("qwen2")
    before, inside, after = run_ranks(2, rounded, folder, tokens)[1]
    with torch.no_grad():
        for parameter in model.parameters():  # not the buffers, which .bfloat16() would round too
            parameter.copy_(parameter.bfloat16())
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(inside, expected, rtol=0, atol=1e-5)
    assert torch.equal(before, after) and not torch.equal(before, inside)


def wrong_shape(world, folder):
    parent = open_parent(str(folder))
    config = load_config(parent)
    config.intermediate_size += 1
    engine = open_engine(Options(dtype="fp32", replicas=1, activation_checkpointing=False, compile=False), world)
    try:
        engine.load(HubArchitecture(config), WeightReader(parent))
    except UserError as error:
        return str(error)


def test_weights_that_do_not_fit_the_config_are_named(save_parent):
    folder, _ = save_parent("llama")
    (message,) = run_ranks(1, wrong_shape, folder)
    assert "gate_proj.weight is (48, 32), but config.json makes it (49, 32)" in message


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(save_parent, tokens):
    folder, model = save_parent("llama")
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    for found, _ in run_ranks(2, load_and_logits, folder, tokens, {"compile": True}):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_members_read_back_in_plain_transformers_have_the_engines_logits(save_parent, tokens):
    folder, _ = save_parent("mistral")
    found, _ = run_ranks(2, load_and_logits, folder, tokens, {})[0]
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(input_ids=tokens).logits, found, rtol=0, atol=2e-5)

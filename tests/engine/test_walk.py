"""A live sharded model block by block, and its decomposition in order, against the plain Hugging Face model."""

import copy

import pytest
import torch
from processes import run_ranks
from sharded import architecture, opened, shapes_of

from plrd_train.compress.blocks import Alone, gathered, walk
from plrd_train.compress.contracts import DecompositionError
from plrd_train.compress.methods.rom import Method
from plrd_train.compress.ranks import Shape
from plrd_train.compress.sequential import factor_in_order
from plrd_train.compress.surgery import eligible_linears
from plrd_train.parents.parent import open_parent
from plrd_train.parents.weights import WeightReader

TEXT = torch.randint(3, 64, (5, 11), generator=torch.Generator().manual_seed(1))
ROM = Method(calibration_tokens=1)
ENGINES = pytest.mark.parametrize("engine", ["fsdp", "zero3"])


def blocks(engine, folder):
    """A walk over this rank's batches of TEXT: two of unequal size on the first, one on the second, none on any further
    rank."""
    split = [[TEXT[:2], TEXT[2:3]], [TEXT[3:]]] if engine.world_size > 1 else [[TEXT[:3], TEXT[3:]]]
    own = split[engine.rank] if engine.rank < len(split) else []
    return walk(architecture(folder, {}), gathered(engine), own, engine.device)


def inputs_of_blocks(world, name, folders):
    found = []
    for folder in folders:
        engine = opened(world, name, folder)
        found.append([(block.name, torch.cat([x.clone() for x in block.inputs])) for block in blocks(engine, folder)])
    return found


@ENGINES
def test_blocks_are_given_what_the_whole_model_gives_them(save_parent, engine):
    parents = [
        save_parent(architecture_) for architecture_ in ("llama_tied_scaled_rope", "mistral", "gemma3", "gpt_neox")
    ]
    results = run_ranks(2, inputs_of_blocks, engine, [folder for folder, _ in parents])
    for parent, (_, model) in enumerate(parents):
        with torch.no_grad():
            expected = model.eval()(input_ids=TEXT, output_hidden_states=True).hidden_states
        for block in range(2):
            (name, first), (_, second) = (result[parent][block] for result in results)
            assert name.endswith(f"layers.{block}")
            torch.testing.assert_close(torch.cat([first, second]), expected[block], rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture_", ["gptj", "codegen", "gpt_neo", "opt", "llama4", "bamba", "bloom"])
def test_blocks_of_a_checkpoint_whatever_they_return_and_the_model_does_behind_them(save_parent, architecture_):
    folder, model = save_parent(architecture_)
    alone = Alone(WeightReader(open_parent(str(folder))).read, torch.device("cpu"))
    with torch.no_grad():
        expected = model.eval()(input_ids=TEXT, output_hidden_states=True).hidden_states
    for block, hidden in zip(blocks(alone, folder), expected, strict=False):
        torch.testing.assert_close(torch.cat(block.inputs), hidden, rtol=0, atol=1e-5)


def in_order(world, name, folder, rank):
    engine = opened(world, name, folder)
    shapes = shapes_of(engine)
    made = factor_in_order(engine, lambda: blocks(engine, folder), shapes, dict.fromkeys(shapes, rank), ROM)
    factors = {one.name: one for one in made}
    order, errors = list(factors), {one.name: one.metric_error for one in factors.values()}
    engine.rebuild(architecture(folder, dict.fromkeys(shapes, rank)), factors)
    tensors = dict(engine.tensors())
    products = (
        {linear: tensors[f"{linear}.up.weight"] @ tensors[f"{linear}.down.weight"] for linear in shapes}
        if engine.rank == 0
        else {}
    )
    return order, errors, products, {linear: tensors.get(f"{linear}.up.bias") for linear in shapes}


def reference(model, order, rank):
    """LLM-ROM by its equations in float64: W1 = V_r^T W and W2 = V_r, V the eigenvectors of the moment of what the
    Linear gives in the model as compressed so far. And the relative error of each Linear's outputs."""
    model = copy.deepcopy(model).double().eval()
    linears, errors = dict(eligible_linears(model)), {}
    for name in order:
        inputs = []
        handle = linears[name].register_forward_pre_hook(
            lambda module, given, inputs=inputs: inputs.append(given[0].flatten(0, 1))
        )
        with torch.no_grad():
            model(input_ids=TEXT)
            handle.remove()
            weight = linears[name].weight
            outputs = inputs[0] @ weight.T
            main = torch.linalg.eigh(outputs.T @ outputs).eigenvectors[:, -rank:]
            errors[name] = ((outputs - outputs @ main @ main.T).norm() / outputs.norm()).item()
            weight.copy_(main @ (main.T @ weight))
    return {name: linear.weight.detach() for name, linear in linears.items()}, errors


@ENGINES
@pytest.mark.parametrize(("size", "architecture_"), [(1, "llama"), (3, "qwen2")])
def test_rom_is_that_of_its_equations(save_parent, engine, size, architecture_):
    folder, model = save_parent(architecture_)
    results = run_ranks(size, in_order, engine, folder, 12)
    order, errors, products, biases = results[0]
    assert order == [name for name, _ in eligible_linears(model)]  # Llama's modules stand in the order of their calls
    expected, lost = reference(model, order, 12)
    for name, weight in expected.items():
        assert (products[name].double() - weight).norm() <= 1e-4 * weight.norm(), name
        assert errors[name] == pytest.approx(lost[name], rel=1e-3)
        bias = model.get_submodule(name).bias
        assert bias is None or torch.equal(biases[name], bias)
    assert all(result[:2] == results[0][:2] for result in results)


def test_rom_of_a_checkpoint_without_an_engine(save_parent):
    folder, model = save_parent("gpt_neox", max_shard_size="20KB")
    reader = WeightReader(open_parent(str(folder)))
    shapes = {name: Shape.of(linear) for name, linear in eligible_linears(model)}
    alone = Alone(reader.read, torch.device("cpu"))
    order, products = [], {}
    for made in factor_in_order(alone, lambda: blocks(alone, folder), shapes, dict.fromkeys(shapes, 12), ROM):
        order.append(made.name)
        products[made.name] = made.up @ made.down
    expected, _ = reference(model, order, 12)
    assert products.keys() == expected.keys()
    for name, weight in expected.items():
        assert (products[name].double() - weight).norm() <= 1e-4 * weight.norm(), name


def beyond_the_blocks(world, folder):
    engine = opened(world, "fsdp", folder)
    with pytest.raises(DecompositionError, match=r"^lm_head: no block of the model calls it"):
        list(factor_in_order(engine, lambda: blocks(engine, folder), shapes_of(engine), {"lm_head": 3}, ROM))


def test_a_linear_outside_the_blocks_is_named(save_parent):
    folder, _ = save_parent("llama")
    run_ranks(1, beyond_the_blocks, folder)

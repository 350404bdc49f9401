"""The loss with one Linear factored, over live sharded models, against the plain Hugging Face model in float64."""

import copy

import pytest
import torch
from processes import run_ranks
from sharded import factor, live_bytes, logits, opened, shapes_of
from torch.nn import functional as F

from plrd_train.compress.allocations.sensitivity import Allocation
from plrd_train.compress.losses import measure
from plrd_train.compress.methods.svd import Method
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import Spectra
from plrd_train.compress.surgery import eligible_linears

TEXT = torch.randint(3, 64, (5, 11), generator=torch.Generator().manual_seed(1))
BY_LOSSES = Allocation(multiple=1, tokens=1)
DEAD = "model.layers.1.mlp.up_proj"  # what it gives goes nowhere, below


def shares(rank, world_size):
    split = [[TEXT[:2], TEXT[2:3]], [TEXT[3:]]] if world_size > 1 else [[TEXT[:3], TEXT[3:]]]
    return split[rank] if rank < len(split) else []


def measured(world, name, folder, stages, options):
    engine = opened(world, name, folder, **options)
    if stages == 2:
        factor(engine, folder, dict.fromkeys(shapes_of(engine), 12))
    shapes, was = shapes_of(engine), {}
    if stages == 2:
        tensors = dict(engine.tensors())
        was = (
            {linear: tensors[f"{linear}.up.weight"] @ tensors[f"{linear}.down.weight"] for linear in shapes}
            if engine.rank == 0
            else {}
        )
    spectra, said = Spectra(engine, shapes, Method()), []
    spectra.add(list(shapes))
    before = logits(engine, TEXT), live_bytes()
    probes = {linear: BY_LOSSES.probe(shape) for linear, shape in shapes.items()}
    grown = measure(engine, spectra, probes, shares(engine.rank, engine.world_size), said.append)
    assert torch.equal(logits(engine, TEXT), before[0]) and said == list(shapes)
    assert live_bytes() <= before[1] + 100_000  # that of the decompositions, which svd cuts into float64 where it must
    ranks = {ratio: BY_LOSSES.ranks(shapes, ratio, spectra.values, grown) for ratio in (1.5, 3.0)}
    return grown, ranks, was


def reference(model, shapes, was):
    """The growth of the loss by the best pair of each Linear in its place, in float64."""
    model = copy.deepcopy(model).double().eval()
    for name, weight in was.items():
        model.get_submodule(name).weight.data.copy_(weight)

    @torch.no_grad()
    def loss():
        return F.cross_entropy(model(input_ids=TEXT).logits[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten()).item()

    whole, grown = loss(), {}
    for name, shape in shapes.items():
        weight = model.get_submodule(name).weight
        exact, rank = weight.detach().clone(), BY_LOSSES.probe(shape)
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        weight.data.copy_((u[:, :rank] * s[:rank]) @ vh[:rank])
        grown[name] = loss() - whole
        weight.data.copy_(exact)
    return grown


@pytest.mark.parametrize(
    ("engine", "size", "architecture", "stages"),
    [
        ("fsdp", 1, "llama", 1),
        ("fsdp", 2, "qwen2", 2),
        ("fsdp", 3, "gpt_neox", 1),
        ("zero3", 2, "qwen2", 1),
        ("zero3", 3, "mistral", 2),
    ],
)
def test_the_loss_grows_as_that_of_the_plain_model(save_parent, engine, size, architecture, stages):
    folder, model = save_parent(architecture)
    if architecture == "llama":
        with torch.no_grad():
            model.get_submodule(DEAD.replace("up", "down")).weight.zero_()
        model.save_pretrained(folder)
    results = run_ranks(size, measured, engine, folder, stages, {})
    grown, ranks, was = results[0]
    assert all(result[:2] == (grown, ranks) for result in results)
    shapes = {
        name: Shape(linear.out_features, linear.in_features, 12 if stages == 2 else None)
        for name, linear in eligible_linears(model)
    }
    expected = reference(model, shapes, was)
    for name, exact in expected.items():
        assert grown[name] == pytest.approx(exact, abs=2e-5), name
    assert sum(abs(growth) > 1e-3 for growth in expected.values()) >= 4
    for ratio, chosen in ranks.items():
        assert (
            sum(shape.params(chosen.get(name)) for name, shape in shapes.items())
            <= sum(shape.dense_params for shape in shapes.values()) / ratio
        )
        if architecture == "llama":  # of the Linears of its shape, those that the loss depends on get more
            live = [name for name, shape in shapes.items() if shape == shapes[DEAD] and grown[name] > 1e-3]
            assert live and all(chosen[DEAD] < chosen.get(name, 32) for name in live)


def test_in_bf16_it_is_about_the_same(save_parent):
    folder, model = save_parent("qwen2")
    shapes = {name: Shape.of(linear) for name, linear in eligible_linears(model)}
    expected = reference(model, shapes, {})
    for name, at in run_ranks(1, measured, "fsdp", folder, 1, {"dtype": "bf16"})[0][0].items():
        assert at == pytest.approx(expected[name], abs=0.02), name

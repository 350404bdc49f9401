"""Statistics of live sharded models, against dense float64 algebra on the plain Hugging Face model."""

import copy

import pytest
import torch
from processes import run_ranks
from sharded import batches, factor, live_bytes, logits, opened, shapes_of, train
from torch import nn
from torch.nn import functional as F

from plrd_train.compress.collect import collect, distinct_inputs
from plrd_train.compress.contracts import DecompositionError
from plrd_train.compress.ranks import Shape
from plrd_train.compress.surgery import eligible_linears

KINDS = ("inputs", "magnitudes", "gradients")
TEXT = torch.randint(3, 64, (5, 11), generator=torch.Generator().manual_seed(1))
ENGINES = pytest.mark.parametrize("engine", ["fsdp", "zero3"])


def shares(rank, world_size):
    """This rank's batches of TEXT: two of unequal size on the first, one on the second, none on any further rank."""
    split = [[TEXT[:2], TEXT[2:3]], [TEXT[3:]]] if world_size > 1 else [[TEXT[:3], TEXT[3:]]]
    return split[rank] if rank < len(split) else []


def collected(engine, kind, window_bytes=2**30):
    """The statistics that this rank gets, and how many windows there were."""
    shapes, own, windows = shapes_of(engine), {}, 0
    for part, statistics in collect(engine, kind, shapes, shapes, shares(engine.rank, engine.world_size), window_bytes):
        assert statistics.keys() <= set(part)
        own.update(statistics)
        windows += 1
    return own, windows


def merged(results):
    """Each Linear's statistic, from the one rank that has it."""
    together = {}
    for own, _ in results:
        assert not together.keys() & own.keys()
        together.update(own)
    return together


def reference(model, kind):
    """The statistics in float64, sequence by sequence."""
    model = copy.deepcopy(model).double().eval()
    sums = {}
    for ids in TEXT[:, None]:
        inputs, handles = {}, []

        def keep(module, given, inputs=inputs):
            inputs[module] = given[0].detach()[0]

        for _, linear in eligible_linears(model):
            handles.append(linear.register_forward_pre_hook(keep))
        predicted = model(input_ids=ids).logits
        model.zero_grad()
        F.cross_entropy(predicted[0, :-1], ids[0, 1:], reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for name, linear in eligible_linears(model):
            x, gradient = inputs[linear], linear.weight.grad
            of_sequence = {"inputs": x.T @ x, "magnitudes": x.abs().sum(0), "gradients": gradient.square().sum(0)}[kind]
            sums[name] = sums.get(name, 0) + of_sequence
    return {name: total / (len(TEXT) if kind == "gradients" else TEXT.numel()) for name, total in sums.items()}


def check(found, model, kind, tolerance=2e-6):
    expected = reference(model, kind)
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        assert found[name].dtype == torch.float32 and (found[name].ndim == 1 or torch.equal(found[name], found[name].T))
        assert (found[name].double() - exact).norm() <= tolerance * exact.norm() * (10 if kind == "gradients" else 1), (
            name
        )


def of_parents(world, name, folders):
    found = []
    for folder in folders:
        engine = opened(world, name, folder)
        groups = distinct_inputs(engine.model, shapes_of(engine), lambda engine=engine: logits(engine, TEXT))
        found.append((groups, {kind: collected(engine, kind) for kind in KINDS}))
    return found


LLAMA = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
NEOX = [["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Each architecture and number of ranks once, on one of the engines; on the other with `-m slow`.
PARENTS = [("fsdp", 2, ["mistral", "gemma"]), ("zero3", 3, ["qwen2", "gpt_neox"]), ("zero3", 1, ["llama"])]
PARENTS += [slow("zero3", 2, ["mistral", "gemma"]), slow("fsdp", 3, ["qwen2", "gpt_neox"]), slow("fsdp", 1, ["llama"])]


@pytest.mark.parametrize(("engine", "size", "architectures"), PARENTS)
def test_statistics_are_those_of_the_plain_model(save_parent, engine, size, architectures):
    parents = [save_parent(architecture) for architecture in architectures]
    results = run_ranks(size, of_parents, engine, [folder for folder, _ in parents])
    for parent, (architecture, (_, model)) in enumerate(zip(architectures, parents, strict=True)):
        of_block = [
            (f"gpt_neox.layers.{i}.", NEOX) if architecture == "gpt_neox" else (f"model.layers.{i}.", LLAMA)
            for i in range(2)
        ]
        for result in results:
            assert result[parent][0] == [
                tuple(prefix + name for name in names) for prefix, block in of_block for names in block
            ]
        for kind in KINDS:
            check(merged([result[parent][1][kind] for result in results]), model, kind)


def of_later_stage(world, name, folder):
    """All kinds in one window and the inputs in as many as can be, of the model once factored; and that model's weights
    multiplied out."""
    engine = opened(world, name, folder, activation_checkpointing=True)
    factor(engine, folder, dict.fromkeys(shapes_of(engine), 6))
    tensors = dict(engine.tensors())
    dense = (
        {n: tensors[f"{n}.up.weight"] @ tensors[f"{n}.down.weight"] for n in shapes_of(engine)}
        if engine.rank == 0
        else {}
    )
    return {kind: collected(engine, kind) for kind in KINDS}, collected(engine, "inputs", window_bytes=1), dense


@ENGINES
def test_statistics_of_a_later_stage_are_those_of_its_products(save_parent, engine):
    folder, model = save_parent("qwen2")
    results = run_ranks(2, of_later_stage, engine, folder)
    with torch.no_grad():
        for name, weight in results[0][2].items():
            model.get_submodule(name).weight.copy_(weight)
    for kind in KINDS:
        assert [result[0][kind][1] for result in results] == [1, 1]
        check(merged([result[0][kind] for result in results]), model, kind)
    assert [result[1][1] for result in results] == [8, 8]  # distinct inputs
    check(merged([result[1] for result in results]), model, "inputs")


def what_is_left(world, name, folder, data):
    engine = opened(world, name, folder)
    engine.restore(engine.snapshot())
    logits(engine, data[0])
    before = live_bytes()
    for kind in KINDS:
        collected(engine, kind)
    logits(engine, data[0])
    return before, live_bytes(), train(engine, data), dict(engine.tensors())


def trained(world, name, folder, data):
    engine = opened(world, name, folder)
    return train(engine, data), dict(engine.tensors())


@ENGINES
def test_nothing_is_left_behind(save_parent, engine):
    folder, _ = save_parent("llama")
    data = batches(3, 4)
    expected, tensors = run_ranks(2, trained, engine, folder, data)[0]
    for before, after, norms, again in run_ranks(2, what_is_left, engine, folder, data):
        assert after == before
        assert norms == expected
        assert all(again[name] is None or torch.equal(again[name], tensor) for name, tensor in tensors.items())


def of_bf16(world, name, folder):
    engine = opened(world, name, folder, dtype="bf16")
    return {kind: collected(engine, kind) for kind in KINDS}


@ENGINES
def test_bf16_products_change_the_statistics_little(save_parent, engine):
    folder, model = save_parent("llama")
    results = run_ranks(2, of_bf16, engine, folder)
    for kind in KINDS:
        check(merged([result[kind] for result in results]), model, kind, tolerance=0.02)


def of_compiled_blocks(world, folder):
    engine = opened(world, "fsdp", folder)
    for layer in engine.model.model.layers:
        layer.compile(backend="eager")
    engine.model.eval()
    for ids in (TEXT[:1, :2], *shares(0, 1)):
        with torch.no_grad():
            engine.model(input_ids=ids, use_cache=False)  # compiles them for all shapes to come, without the hooks
    own = collected(engine, "inputs")
    engine.model.model.unused = nn.Linear(2, 2)
    with pytest.raises(DecompositionError, match=r"model\.unused: the model does not call it"):
        next(collect(engine, "inputs", {"model.unused": Shape(2, 2)}, ["model.unused"], [TEXT]))
    return own


def test_compiled_blocks_are_seen_too_and_a_linear_without_inputs_is_named(save_parent):
    folder, model = save_parent("llama")
    check(merged(run_ranks(1, of_compiled_blocks, folder)), model, "inputs")

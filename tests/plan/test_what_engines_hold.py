"""What the plans of the engines say that is gathered, against the engines themselves."""

from dataclasses import replace

import pytest
import torch
from engine.sharded import OPTIMIZER, SETTINGS, logits, opened
from processes import run_ranks

from plrd_train.engine.zero3 import Options
from plrd_train.parents.models import build_model
from plrd_train.parents.parent import load_config, open_parent
from plrd_train.plan.phases import memory_of
from plrd_train.plan.trace import trace_step
from plrd_train.recover.objectives.ce import cross_entropy
from plrd_train.structure import Parameter, Structure

IDS = torch.arange(3, 43).view(2, 20)


def gathered_at_the_loss(world, folder, evaluated):
    """The parameters that are whole or in flight on this rank when the loss is computed, once DeepSpeed knows the order
    of the modules."""
    engine = opened(world, "zero3", folder)
    if evaluated:
        logits(engine, IDS)
    engine.start(OPTIMIZER)
    engine.model.train()
    for _ in range(4):
        loss = cross_entropy(engine.model, IDS)
        whole = {name: p.ds_numel for name, p in engine.model.named_parameters() if p.ds_status.name != "NOT_AVAILABLE"}
        engine.backward(loss)
    return whole


@pytest.mark.parametrize("evaluated", [True, False], ids=["evaluated", "resumed"])
def test_what_zero3_keeps_whole_until_the_backward(save_parent, evaluated):
    folder, _ = save_parent("llama_tied_scaled_rope")
    found = run_ranks(2, gathered_at_the_loss, folder, evaluated)
    with torch.device("meta"):
        model = build_model(load_config(open_parent(str(folder)))).train()
    structure = Structure.of(model)
    events = trace_step(model, lambda model: cross_entropy(model, IDS.to("meta")))
    memory = memory_of("zero3", settings(), OPTIMIZER, 2, "cuda")
    holder = memory.holder(structure, events, resumed=not evaluated)
    for event in events:
        list(holder.on(event))
        if (event.kind, event.name) == ("forwarded", ""):
            break
    assert [holder.held()["gathered"] / memory.width] * 2 == [sum(whole.values()) for whole in found]


def settings():
    return Options(**SETTINGS["zero3"])


def test_parameters_on_nvme_are_neither_on_the_device_nor_all_on_the_host():
    matrix, norm, ranks = (8192, 8192), (8192,), 64
    structure = Structure(tuple(Parameter(str(i), shape, "", "") for i in range(1000) for shape in (matrix, norm)), {})
    slices = {shape: 4 * torch.Size(shape).numel() / ranks for shape in (matrix, norm)}

    def device_and_host(place):
        memory = memory_of(
            "zero3", replace(settings(), offload_params=place, nvme_path="swap"), OPTIMIZER, ranks, "cuda"
        )
        return memory.resident(structure, optimizer=True)["parameters"], memory.host(structure).get("parameters", 0)

    kept, on_host, in_files = map(device_and_host, ("none", "cpu", "nvme"))
    assert (
        (kept[1], on_host[1]) == (0, 1000 * sum(slices.values()))
        and kept[0] - on_host[0] == on_host[1]
        and in_files[0] == on_host[0]
    )
    # Norms, which are too small for files; what is whole at once, 1e9 elements; and six buffers.
    assert in_files[1] == 1000 * slices[norm] + 4 * 1e9 / ranks + 6 * slices[matrix]

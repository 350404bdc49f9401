"""The memory of each phase of a run on its first rank, by part."""

import dataclasses
import importlib
import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plrd_train.compress import forms
from plrd_train.compress.packing import Packer
from plrd_train.compress.rounds import changes
from plrd_train.config.schema import Config
from plrd_train.engine import Optimizer
from plrd_train.errors import UserError
from plrd_train.plan.factoring import factoring, factors, in_rounds
from plrd_train.plan.models import Planned, micro_batch, sequences
from plrd_train.plan.replay import peak
from plrd_train.structure import Parts, add, total

PUBLISHED_SHARD = 5 * 2**30  # bytes of a member that are assembled in host memory before a write
# A rank's checkpoint file is assembled in host memory, and copied once, before it is written (safetensors'
# `save`, as DCP's writer calls it).
FILE_COPIES = 2


@dataclass(frozen=True)
class Phase:
    """Bytes by part, on the device and on the host, at the peak of a phase.

    stage: a member's name, or "parent". when: the moment of the peak. Device parts: parameters (with float32 masters),
    gradients, optimizer, gathered (unsharded parameters), activations, factorization. Host parts: offloaded states,
    snapshots and checkpoints.
    """

    stage: str
    name: str
    when: str
    device: Parts
    host: Parts


def memory_of(name: str, settings: Any, optimizer: Optimizer, world_size: int, device: str) -> Any:
    """The memory model of the engine `name`: its file of that name here. Raises UserError where there is none."""
    path = f"plrd_train.plan.{name}"
    if importlib.util.find_spec(path) is None:
        raise UserError(
            f"engine={name}: nothing here says what it keeps in memory ({path} is missing); plan with engine=fsdp or "
            "engine=zero3"
        )
    return importlib.import_module(path).Memory(settings, optimizer, world_size, device)


def phases(config: Config, models: Sequence[Planned], world_size: int, device: str, published: int) -> Iterator[Phase]:
    """Yield the phases of the run over `models` (the parent first), in order.

    `device` is "cpu" or "cuda"; `published` is the bytes per parameter of a published member.
    """
    memory = memory_of(config.engine.name, config.engine.settings, config.optimizer.settings, world_size, device)
    parent = models[0]
    if parent.training:
        yield from _training(config, memory, parent, world_size)
    yield _evaluation(config, memory, parent, published, trained=bool(parent.training))
    for before, model in itertools.pairwise(models):
        old, trained = before.structure, before is not parent
        resident, host = memory.resident(old, optimizer=trained), memory.host(old)
        for name, when, on_device, on_host in factoring(
            config, memory, old, model.shapes, model.ranks, model.text, world_size
        ):
            yield Phase(model.name, name, when, add(resident, on_device), add(host, on_host))
        made = factors(memory, model.shapes, changes(model.shapes, model.ranks))
        yield Phase(model.name, "rebuild", "", *memory.rebuilt(old, model.structure, made, optimizer=trained))
        yield from _packing(config, memory, model, world_size, trained=False)
        yield _evaluation(config, memory, model, published, trained=False)
        yield from _training(config, memory, model, world_size)
        yield from _packing(config, memory, model, world_size, trained=True)
        yield _evaluation(config, memory, model, published, trained=True)
        yield _publication(config, memory, model, published, device)


def _training(config: Config, memory: Any, model: Planned, world_size: int) -> Iterator[Phase]:
    structure = model.structure
    resident = memory.resident(structure, optimizer=True)
    copy = 4 * _kept(memory, model)  # of one of the things that a checkpoint holds
    branch = config.branches()
    saved = copy + 4 * memory.state(structure)
    host = add(
        memory.host(structure),
        {
            "checkpoint": saved + FILE_COPIES * (saved + (copy if branch else 0)),
            "snapshot": copy if branch else 0.0,
        },
    )
    micro_batches = -(-sequences(config) // world_size) / micro_batch(config, world_size)
    settings = {"accumulated": micro_batches > 1}
    parts, when = peak(model.training, memory.holder(structure, model.training, **settings))
    yield Phase(model.name, "forward and backward", when, add(resident, parts), host)
    resumed, when = peak(model.training, memory.holder(structure, model.training, **settings, resumed=True))
    if total(resumed) > total(parts):
        yield Phase(model.name, "the same, resumed in it", when, add(resident, resumed), host)
    yield Phase(model.name, "update", "in the optimizer", add(resident, memory.update(structure)), host)


def _packing(config: Config, memory: Any, model: Planned, world_size: int, *, trained: bool) -> Iterator[Phase]:
    """Owners convert the pairs to the form before an evaluation, if the form does not store pairs."""
    form = config.form.name
    if not (forms.get(form).PACKS and model.ranks):
        return
    pairs = {name: dataclasses.replace(model.shapes[name], rank=rank) for name, rank in model.ranks.items()}
    parts = {
        "factorization": in_rounds(memory, Packer(form), pairs, pairs, model.ranks, world_size, [0.0] * world_size)
    }
    yield Phase(
        model.name,
        "pack",
        "",
        add(memory.resident(model.structure, optimizer=trained), parts),
        memory.host(model.structure),
    )


def _evaluation(config: Config, memory: Any, model: Planned, published: int, *, trained: bool) -> Phase:
    parts, when = peak(model.evaluation, memory.holder(model.structure, model.evaluation))
    copy = 4 * _kept(memory, model)
    changed = published < 4 or (forms.get(config.form.name).PACKS and bool(model.ranks))
    host = {"snapshot": copy if changed else 0.0}  # the exact values, kept while the model holds rounded or packed ones
    if trained:  # the end of the stage saves the trunk, and the member if it differs
        saved = 2 if config.branches() else 1
        host = add(host, {"snapshot": saved * copy, "checkpoint": FILE_COPIES * saved * copy})
    return Phase(
        model.name,
        "evaluate",
        when,
        add(memory.resident(model.structure, optimizer=trained), parts),
        add(memory.host(model.structure), host),
    )


def _publication(config: Config, memory: Any, model: Planned, published: int, device: str) -> Phase:
    """The first rank gathers each parameter (as received, and assembled) and copies it to the host, into the file."""
    structure = model.structure
    largest = 4 * max(parameter.numel for parameter in structure.parameters)
    member = min(PUBLISHED_SHARD, published * model.params) + (largest if device == "cuda" else 0)
    host = {"snapshot": 4 * _kept(memory, model) * (2 if config.branches() else 1), "member": member}
    resident = memory.resident(structure, optimizer=True)
    return Phase(model.name, "publish", "", add(resident, {"gathered": 2 * largest}), add(memory.host(structure), host))


def _kept(memory: Any, model: Planned) -> int:
    """Elements of the first rank's shards."""
    return sum(memory.shard(parameter.shape) for parameter in model.structure.parameters)


def device_bytes(phase: Phase, device: str) -> float:
    """Bytes of the device; where that is a CPU, host memory is the same."""
    return total(phase.device) + (total(phase.host) if device == "cpu" else 0.0)


def host_bytes(all_phases: Sequence[Phase]) -> float:
    """The most that one rank takes of the host."""
    return max(total(phase.host) for phase in all_phases)


def as_parts(parts: Mapping[str, float]) -> dict[str, int]:
    """Whole bytes, parts of nothing left out."""
    return {name: round(size) for name, size in parts.items() if size}

"""The memory of each phase of a run on its first rank, by part."""

import importlib
import importlib.util
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plrd_train.config import Config
from plrd_train.errors import UserError
from plrd_train.lowrank.calibration import KINDS, WINDOW_BYTES
from plrd_train.lowrank.distributed import changes, rounds
from plrd_train.lowrank.ranks import SPECTRAL, Shape
from plrd_train.plan.models import Planned, micro_batch, sequences
from plrd_train.plan.replay import peak
from plrd_train.plan.structure import Parts, add, total

PUBLISHED_SHARD = 5 * 2**30  # bytes of a member that are put together in host memory before they are written
# A rank's file of a checkpoint is put together in host memory, and copied once, before it is written (safetensors' `save`, as DCP's writer calls it).
FILE_COPIES = 2


@dataclass(frozen=True)
class Phase:
    """Bytes by part in the memory of the device and of the host, at the highest moment of a phase of the stage `stage` (a member's name, "parent").

    Device parts: parameters (with float32 masters), gradients, optimizer, gathered (parameters that are whole for a while), activations,
    factorization. Host parts: what engines offload, and snapshots.
    """

    stage: str
    name: str
    when: str
    device: Parts
    host: Parts


def memory_of(name: str, settings: Any, world_size: int, device: str) -> Any:
    """The memory model of the engine `name`: its file of that name here. Raises UserError where there is none."""
    path = f"plrd_train.plan.{name}"
    if importlib.util.find_spec(path) is None:
        raise UserError(f"engine={name}: nothing here says what it keeps in memory ({path} is missing); plan with engine=fsdp or engine=zero3")
    return importlib.import_module(path).Memory(settings, world_size, device)


def phases(config: Config, models: Sequence[Planned], world_size: int, device: str) -> Iterator[Phase]:
    """Each phase of the run over `models`, the parent first, in order; `device` is "cpu" or "cuda"."""
    memory = memory_of(config.engine.name, config.engine.settings, world_size, device)
    parent = models[0]
    if parent.training:
        yield from _training(config, memory, parent, world_size)
    yield _evaluation(config, memory, parent, trained=bool(parent.training))
    for before, model in itertools.pairwise(models):
        trained = before is not parent
        on_device, on_host, factors = _factorization(config, memory, before, model, world_size)
        resident = memory.resident(before.structure, optimizer=trained)
        yield Phase(model.name, "factor", "", add(resident, on_device), add(memory.host(before.structure), on_host))
        yield Phase(model.name, "rebuild", "", *memory.rebuilt(before.structure, model.structure, factors, optimizer=trained))
        yield _evaluation(config, memory, model, trained=False)
        yield from _training(config, memory, model, world_size)
        yield _evaluation(config, memory, model, trained=True)
        yield _publication(config, memory, model)


def _training(config: Config, memory: Any, model: Planned, world_size: int) -> Iterator[Phase]:
    structure = model.structure
    resident = memory.resident(structure, optimizer=True)
    copy = 4 * _kept(memory, model)  # of one of the things that a checkpoint holds
    branch = config.recover.branch > 0
    host = add(memory.host(structure), {"checkpoint": (3 + FILE_COPIES * (4 if branch else 3)) * copy, "snapshot": copy if branch else 0.0})
    micro_batches = -(-sequences(config) // world_size) / micro_batch(config, world_size)
    settings = {"accumulated": micro_batches > 1}
    parts, when = peak(model.training, memory.holder(structure, model.training, **settings))
    yield Phase(model.name, "forward and backward", when, add(resident, parts), host)
    resumed, when = peak(model.training, memory.holder(structure, model.training, **settings, resumed=True))
    if total(resumed) > total(parts):
        yield Phase(model.name, "the same, resumed in it", when, add(resident, resumed), host)
    yield Phase(model.name, "update", "in the optimizer", add(resident, memory.update(structure)), host)


def _evaluation(config: Config, memory: Any, model: Planned, *, trained: bool) -> Phase:
    parts, when = peak(model.evaluation, memory.holder(model.structure, model.evaluation))
    copy = 4 * _kept(memory, model)
    host = {"snapshot": copy}  # of the exact values, while they are rounded
    if trained:  # and what the end of the stage saves: the trunk, and the member where that is another
        saved = 2 if config.recover.branch else 1
        host = {"snapshot": copy * (1 + saved), "checkpoint": FILE_COPIES * saved * copy}
    resident = memory.resident(model.structure, optimizer=trained)
    return Phase(model.name, "evaluate", when, add(resident, parts), add(memory.host(model.structure), host))


def _publication(config: Config, memory: Any, model: Planned) -> Phase:
    """Each parameter is put together on the first rank: as received, and whole."""
    structure = model.structure
    largest = 4 * max(parameter.numel for parameter in structure.parameters)
    member = min(PUBLISHED_SHARD, 4 * structure.numel) + 2 * largest
    host = {"snapshot": 4 * _kept(memory, model) * (2 if config.recover.branch else 1), "member": member}
    resident = memory.resident(structure, optimizer=True)
    return Phase(model.name, "publish", "", add(resident, {"gathered": 2 * largest}), add(memory.host(structure), host))


def _kept(memory: Any, model: Planned) -> int:
    """Elements of the first rank's shards."""
    return sum(memory.shard(parameter.shape) for parameter in model.structure.parameters)


def _factorization(config: Config, memory: Any, before: Planned, model: Planned, world_size: int) -> tuple[Parts, Parts, float]:
    """(device, host, bytes of the new factors' shards) of factoring, on the first rank, which has the costliest weight of each round.

    It holds that weight, what the method takes to decompose it, the weight of the next round, which is received meanwhile and then put together, and
    the shards of the factors that are done; of calibration, the statistics of a window of Linears. Where the ranks depend on the spectra, all that is
    decomposed waits on the host. A method that factors in order holds a whole block and its part of the text as hidden states, before and after it.
    """
    method, shapes, ranks = config.factorizer.settings, model.shapes, changes(model.shapes, model.ranks)
    statistics = [4 * math.prod(KINDS[method.statistics].size(shapes[name])) for name in ranks] if method.statistics else [0]
    dealt = list(rounds(shapes, ranks, world_size))
    own = [shapes[names[0]] for names in dealt]
    weights = [4 * shape.params(shape.rank) for shape in own]
    done = highest = 0.0
    for names, shape, weight, following in zip(dealt, own, weights, [*weights[1:], 0], strict=True):
        highest = max(highest, done + weight + max(weight, method.peak_bytes(shape) + following))
        for name in names:
            done += 4 * sum(memory.shard(factor) for factor in _factors(shapes[name], ranks[name]))
    if method.sequential:
        in_blocks = Counter[str]()
        for parameter in before.structure.parameters:
            in_blocks[parameter.block] += 4 * parameter.numel if parameter.block else 0
        states = 4 * min(shape.in_features for shape in own) * method.calibration_tokens / world_size
        highest = done + max(in_blocks.values()) + 2 * states + max(statistics) + max(map(method.peak_bytes, own))
    else:
        highest += min(WINDOW_BYTES, sum(statistics))
    waiting = 0.0
    if config.ranks.name in SPECTRAL:
        waiting = sum(weights) + sum(4 * min(shape.out_features, shape.in_features, shape.rank or math.inf) ** 2 for shape in own)
    return {"factorization": max(highest, done)}, {"factorization": waiting}, done


def _factors(shape: Shape, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (shape.out_features, rank), (rank, shape.in_features)


def device_bytes(phase: Phase, device: str) -> float:
    """Bytes of the device; where that is a CPU, host memory is the same."""
    return total(phase.device) + (total(phase.host) if device == "cpu" else 0.0)


def host_bytes(all_phases: Sequence[Phase]) -> float:
    """The most that one rank takes of the host."""
    return max(total(phase.host) for phase in all_phases)


def as_parts(parts: Mapping[str, float]) -> dict[str, int]:
    """Whole bytes, parts of nothing left out."""
    return {name: round(size) for name, size in parts.items() if size}

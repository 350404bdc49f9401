"""A plan as one object, and its texts: for people, and as JSON."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from plrd_train.config.schema import Config
from plrd_train.plan import cost
from plrd_train.plan.cost import GB, Checkpoints, Machine
from plrd_train.plan.models import Planned, planned, traced_as
from plrd_train.plan.phases import Phase, as_parts, device_bytes, host_bytes, phases
from plrd_train.structure import add, total


@dataclass(frozen=True)
class Plan:
    """The models, memory, time and disk of a run, computed before it begins."""

    config: Config
    parent: PreTrainedConfig
    machine: Machine
    models: Sequence[Planned]
    phases: Sequence[Phase]
    checkpoints: Checkpoints

    @classmethod
    def of(
        cls, config: Config, parent: PreTrainedConfig, machine: Machine, models: Sequence[Planned] | None = None
    ) -> "Plan":
        """Plan `config` for `parent` on `machine`.

        `models` may be reused from a plan with equal `traced_as`. Raises UserError if the config cannot be run with
        this parent on this machine.
        """
        models, published = models or list(planned(config, parent, machine.world_size)), _dtype(parent).itemsize
        every = list(phases(config, models, machine.world_size, machine.kind, published))
        return cls(config, parent, machine, models, every, cost.checkpoints(config, parent, models, machine, published))

    def changed(self, config: Config, machine: Machine) -> "Plan":
        """The plan of the same members with another `config`, or on another `machine`."""
        alike = traced_as(config, machine.world_size) == traced_as(self.config, self.machine.world_size)
        return Plan.of(config, self.parent, machine, self.models if alike else None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parent, in which members are published."""
        return _dtype(self.parent)

    def highest(self, stage: str | None = None) -> Phase:
        """The phase of the run, or of one stage, with the most device memory."""
        return max(
            (phase for phase in self.phases if stage in (None, phase.stage)),
            key=lambda phase: device_bytes(phase, self.machine.kind),
        )

    @property
    def peak(self) -> Phase:
        return self.highest()

    @property
    def needed(self) -> float:
        """Bytes of memory needed on one device."""
        return self.machine.needed(device_bytes(self.peak, self.machine.kind))

    @property
    def fits(self) -> bool | None:
        return None if self.machine.memory is None else self.needed <= self.machine.memory

    def flops(self, model: Planned) -> float:
        return cost.training_flops(self.config, self.parent, model)

    @property
    def evaluation_flops(self) -> float:
        return cost.evaluation_flops(self.config, self.parent, self.models)

    @property
    def total_flops(self) -> float:
        return self.evaluation_flops + sum(self.flops(model) for model in self.models)

    def hours(self, flops: float) -> float | None:
        seconds = self.machine.seconds(flops)
        return None if seconds is None else seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        parent, *members = self.models
        return {
            "experiment": self.config.experiment,
            "run_dir": self.config.run_dir,
            "engine": self.config.engine.name,
            "machine": {
                "world_size": self.machine.world_size,
                "nodes": self.machine.nodes,
                "device": self.machine.device,
                "device_bytes": self.machine.memory,
                "peak_flops_per_s": self.machine.peak,
                "mfu": self.machine.mfu,
                "disk_bytes_per_s": self.machine.disk,
            },
            "parent": {"path": self.config.parent.path, "params": parent.params, **self._published(parent)},
            "members": [self._member(member) for member in members],
            "memory": {
                "phases": [_phase(phase) for phase in self.phases],
                "peak": _phase(self.peak),
                "device_bytes": round(self.needed),
                "host_bytes_per_node": round(host_bytes(self.phases) * self.machine.world_size / self.machine.nodes),
                "fits": self.fits,
                "why": why(self),
            },
            "tokens": sum(member.tokens for member in members),
            "flops": self.total_flops,
            "hours": self.hours(self.total_flops),
            "checkpoints": {
                "bytes": round(self.checkpoints.size),
                "seconds": self.checkpoints.seconds,
                "run_dir_bytes": round(self.checkpoints.disk),
                "stop_lead_seconds": self.checkpoints.stop_seconds,
            },
            "assumptions": assumptions(self),
        }

    def _published(self, model: Planned) -> dict[str, Any]:
        return {"dtype": str(self.dtype).removeprefix("torch."), "bytes": self.dtype.itemsize * model.params}

    def _member(self, member: Planned) -> dict[str, Any]:
        return {
            "name": member.name,
            "ratio_requested": member.ratio_requested,
            "ratio": member.ratio,
            "params": member.params,
            "linear_params": member.linear_params,
            "ranks": rank_ranges(member),
            **self._published(member),
            "tokens": member.tokens,
            "flops": self.flops(member),
            "hours": self.hours(self.flops(member)),
        }


def rank_ranges(model: Planned) -> dict[str, list[int]]:
    """{last part of a Linear's name: [lowest, highest rank]}, without the dense Linears."""
    ranges: dict[str, list[int]] = {}
    for name, rank in model.ranks.items():
        kind = name.rpartition(".")[2]
        low, high = ranges.get(kind, (rank, rank))
        ranges[kind] = [min(low, rank), max(high, rank)]
    return ranges


def amount(size: float) -> str:
    """Bytes as text, in GB or MB."""
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / 1e6:.1f} MB"


def why(plan: Plan) -> str:
    """A sentence: whether the run fits, and which phase needs the most memory."""
    peak, machine = plan.peak, plan.machine
    held = peak.device if machine.kind == "cuda" else add(peak.device, peak.host)
    parts = ", ".join(
        f"{amount(size)} {name}"
        for name, size in sorted(held.items(), key=lambda item: -item[1])
        if size >= total(held) / 1000
    )
    shards = machine.world_size // getattr(plan.config.engine.settings, "replicas", 1)
    share = f"1/{shards}" if shards > 1 else "all"
    where = f"{peak.stage}, {peak.name}{f', {peak.when}' if peak.when else ''}"
    said = (
        f"the most is in {where}: {amount(total(held))} of tensors on a rank, which has {share} of the "
        f"parameters: {parts}"
    )
    if machine.kind == "cuda":
        said += f"; the allocator and the context take {amount(plan.needed - total(held))} more"
    if machine.memory is None:
        return said
    room = machine.memory - plan.needed
    taken = f"{amount(plan.needed)} are needed on a device of {amount(machine.memory)}"
    fits, lacks = (
        f"it fits: {taken}, and {amount(room)} are left",
        f"it does not fit: {taken}, and {amount(-room)} lack",
    )
    return f"{fits if room >= 0 else lacks}; {said}"


def assumptions(plan: Plan) -> dict[str, str]:
    """{figure: assumption with its value} of everything that is assumed and not measured."""
    machine, config = plan.machine, plan.config
    said = {}
    if machine.peak is not None:
        peak = f"{machine.peak / 1e12:.0f} TFLOP/s, the dense bf16 peak of one {machine.device}"
        said["hours"] = (
            f"{machine.mfu:.0%} of {peak}, in training and evaluation; without factoring, loading, and saving at the "
            "end"
        )
    if machine.kind == "cuda":
        said["device"] = (
            f"{cost.FRAGMENTATION:.0%} of the tensors for PyTorch's allocator, {cost.CONTEXT / GB:.0f} GB for CUDA "
            "and NCCL"
        )
    if config.parent.attention != "eager":
        said["attention"] = "a fused kernel, which keeps nothing of the size of the square of the sequence"
    said["disk"] = (
        f"{machine.disk / GB:g} GB/s for all ranks together; a checkpoint is written, and read once for its checksums"
    )
    steps = (
        f"{cost.STEPS_TO_STOP} steps" if machine.peak is not None else "without the steps, whose time is not known here"
    )
    said["stop"] = (
        f"{steps}, the checkpoint that is being written, one more, and {cost.STOP_MARGIN_S:.0f} s, in training; "
        "factoring has to end first"
    )
    if config.ranks.name != "uniform":
        said["ranks"] = f"uniform; ranks={config.ranks.name} shares out about the same sum once the weights are known"
    if getattr(config.engine.settings, "compile", False):
        said["compile"] = "activations without it, which are no fewer"
    return said


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "stage": phase.stage,
        "phase": phase.name,
        "when": phase.when,
        "device": as_parts(phase.device),
        "device_bytes": round(total(phase.device)),
        "host": as_parts(phase.host),
        "host_bytes": round(total(phase.host)),
    }


def _dtype(parent: PreTrainedConfig) -> torch.dtype:
    dtype = parent.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def kinds(ranks: dict[str, list[int]]) -> str:
    """Ranks by kind of Linear, as text. Kinds of equal rank share an entry: "q/o 910, k/v 364"."""
    together: dict[str, list[str]] = {}
    for kind, (low, high) in ranks.items():
        said = str(low) if low == high else f"{low}-{high}"
        together.setdefault(said, []).append(re.sub(r"_proj$", "", kind))
    return ", ".join(f"{'/'.join(names)} {said}" for said, names in together.items())

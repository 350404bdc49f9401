"""`plrd plan`: its options, and what it prints for people."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from plrd_train.commands._arguments import number, whole
from plrd_train.errors import UserError
from plrd_train.tracking import console
from plrd_train.tracking.table import ABSENT, count

if TYPE_CHECKING:
    from plrd_train.plan.mend import Mend
    from plrd_train.plan.phases import Phase
    from plrd_train.plan.report import Plan

HELP = "say what a run takes before it is launched: memory, hours, disk"
EXAMPLES = ("plrd plan experiment=mistral_7b engine=zero3 --world-size 8 --device H100",)
WIDTH = 120
PARTS = ("parameters", "gradients", "optimizer", "gathered", "activations", "factorization")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="+", help="the arguments of the main job: experiment=NAME key=value …"
    )
    parser.add_argument(
        "--world-size", metavar="N", type=whole(1), default=8, help="ranks, one a device (default: %(default)s)"
    )
    parser.add_argument(
        "--nodes",
        metavar="M",
        type=whole(1),
        default=1,
        help="nodes that the ranks are spread over (default: %(default)s)",
    )
    parser.add_argument(
        "--device", metavar="NAME", default="H100", help="H100, H200, A100, L40S, MI300X or cpu (default: %(default)s)"
    )
    parser.add_argument(
        "--device-memory",
        metavar="GB",
        type=number(above=0),
        help="memory of one device, 1e9 bytes (default: that of the device)",
    )
    parser.add_argument(
        "--mfu",
        metavar="SHARE",
        type=number(above=0, most=1),
        default=0.4,
        help="of the peak that a step reaches (default: %(default)s)",
    )
    parser.add_argument(
        "--disk-gb-per-s",
        metavar="GB",
        type=number(above=0),
        default=1.0,
        help="what all ranks together write in a second (default: %(default)s)",
    )


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Plan the run that `given.overrides` describe. Raises UserError."""
    from plrd_train.config.compose import compose
    from plrd_train.config.schema import from_mapping
    from plrd_train.plan import cost
    from plrd_train.plan.mend import mends
    from plrd_train.plan.parent import parent_config
    from plrd_train.plan.report import Plan

    jobs = compose(given.overrides)
    if len(jobs) != 1:
        raise UserError(f"plan: these arguments describe {len(jobs)} runs; plan one at a time")
    config = from_mapping(jobs[0])
    if given.device != "cpu" and given.device not in cost.DEVICES:
        raise UserError(
            f"--device: {given.device} is not known; choose one of {', '.join(cost.DEVICES)}, cpu, and its memory "
            "with --device-memory"
        )
    if given.world_size % given.nodes:
        raise UserError(
            f"--nodes: {given.nodes} nodes cannot share out {given.world_size} ranks evenly; give a divisor"
        )
    if config.data.streams < given.world_size:
        raise UserError(
            f"data.streams: {config.data.streams} streams cannot feed {given.world_size} ranks; give at least that many"
        )
    if given.world_size % (replicas := getattr(config.engine.settings, "replicas", 1)):
        raise UserError(f"engine.replicas={replicas} does not divide the {given.world_size} ranks: choose a divisor")
    memory = given.device_memory or cost.DEVICES.get(given.device)
    machine = cost.Machine(
        given.world_size,
        given.nodes,
        given.device,
        memory and memory * cost.GB,
        given.mfu,
        given.disk_gb_per_s * cost.GB,
    )
    plan = Plan.of(config, parent_config(config.parent), machine)
    would_fit = mends(plan) if plan.fits is False else []
    if not given.json:
        _print(plan, would_fit)
    result = plan.to_dict()
    result["memory"]["would_fit"] = [{"change": mend.change, "device_bytes": round(mend.needed)} for mend in would_fit]
    return result


def _print(plan: Plan, would_fit: Sequence[Mend]) -> None:
    from plrd_train.plan.cost import GB
    from plrd_train.plan.phases import host_bytes
    from plrd_train.plan.report import amount, assumptions, why

    machine, saved, said = plan.machine, plan.checkpoints, why(plan)
    spread = f" on {machine.nodes} nodes" if machine.nodes > 1 else ""
    ranks = (
        f"{machine.world_size} ranks{spread}, each on one {machine.device}"
        if machine.world_size > 1
        else f"one rank on one {machine.device}"
    )
    console.say(f"{plan.config.parent.path}, engine={plan.config.engine.name}, {ranks}\n")
    _wrapped(f"{said[0].upper()}{said[1:]}.")
    if would_fit:
        _wrapped(
            f"It would fit with {', or with '.join(f'{mend.change} ({amount(mend.needed)})' for mend in would_fit)}."
        )
    elif plan.fits is False:
        _wrapped(
            "Neither a lighter config nor more ranks would make it fit: what is whole on a rank is too large for "
            "such a device."
        )
    console.say("")
    console.table(*_members(plan), left=(7,))
    unit, name = (GB, "GB") if plan.needed >= GB / 10 else (1e6, "MB")
    console.say(
        f"\n{name} of tensors on the fullest rank at the highest moment; each phase of one stage, the highest of the "
        "others:\n"
    )
    header = ("stage", "phase", *PARTS, "device", "host")
    console.table(header, [_row(phase, unit) for phase in _shown(plan)], left=(1,))
    host = amount(host_bytes(plan.phases) * machine.world_size / machine.nodes)
    console.say(f"\nHost memory of a node: {host}, beside what the processes themselves take.")
    _wrapped(
        f"Checkpoints: {amount(saved.size)} each, {saved.seconds:.0f} s to save while training goes on; run_dir "
        f"takes up to {amount(saved.disk)}. "
        f"To stop in time, signal {saved.stop_seconds} s before the limit (Slurm: sbatch "
        f"--signal=B:USR1@{saved.stop_seconds} …)."
    )
    console.say("\nAssumed, not measured; a GB is 1e9 bytes:")
    for name, value in assumptions(plan).items():
        _wrapped(f"{name}: {value}", indent="  ")


def _wrapped(text: str, indent: str = "") -> None:
    console.say(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=indent,
            subsequent_indent=indent * 2,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def _members(plan: Plan) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Header and rows."""
    from plrd_train.plan.report import amount, kinds, rank_ranges

    def cost(flops: float) -> tuple[str, str]:
        hours = plan.hours(flops)
        return f"{flops:.2e}", ABSENT if hours is None else f"{hours:.2f}"

    dtype = str(plan.dtype).removeprefix("torch.")
    header = ("member", "ratio", "parameters", dtype, "tokens", "FLOPs", "hours", "ranks")
    rows: list[Sequence[str]] = []
    for model in plan.models:
        size = amount(plan.dtype.itemsize * model.params)
        trained = (count(model.tokens), *cost(plan.flops(model))) if model.training else (ABSENT,) * 3
        rows.append((model.name, f"{model.ratio:.2f}", count(model.params), size, *trained, kinds(rank_ranges(model))))
    rows.append(("evaluation", *[""] * 4, *cost(plan.evaluation_flops)))
    rows.append(("in all", "", "", "", count(sum(model.tokens for model in plan.models)), *cost(plan.total_flops)))
    return header, rows


def _shown(plan: Plan) -> list[Phase]:
    shown: list[Phase] = []
    for stage in dict.fromkeys(phase.stage for phase in plan.phases):
        shown += (
            [phase for phase in plan.phases if phase.stage == stage]
            if stage == plan.peak.stage
            else [plan.highest(stage)]
        )
    return shown


def _row(phase: Phase, unit: float) -> Sequence[str]:
    from plrd_train.structure import total

    sizes = [phase.device.get(part, 0.0) for part in PARTS] + [total(phase.device), total(phase.host)]
    return phase.stage, phase.name, *(f"{size / unit:.2f}" if size else ABSENT for size in sizes)

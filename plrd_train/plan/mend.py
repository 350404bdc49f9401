"""Changes that make a run fit in memory. Each is planned like the run, and proposed only if it fits."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from plrd_train.config.compose import CONF
from plrd_train.config.schema import Chosen, Config
from plrd_train.engine import ENGINES
from plrd_train.plan.report import Plan

Change = Callable[[Config], Config]
MORE_RANKS = (2, 4, 8, 16, 32, 64)  # multiples of the current number of ranks


@dataclass(frozen=True)
class Mend:
    """A `change` that makes the run fit, as command-line overrides, and the bytes then `needed` on one device."""

    change: str
    needed: float


def mends(plan: Plan) -> list[Mend]:
    """The first change of the config that makes `plan` fit, and the smallest number of ranks that does.

    Neither changes the results of the run, except by rounding. The list is empty if nothing helps.
    """
    machine = plan.machine
    wider = [replace(machine, world_size=machine.world_size * by, nodes=machine.nodes * by) for by in MORE_RANKS]
    changed = ((change, plan.changed(config, machine)) for change, config in _lighter(plan.config))
    spread = (
        (f"{other.world_size} ranks", plan.changed(plan.config, other))
        for other in wider
        if other.world_size <= plan.config.data.streams
    )
    first = (
        next((Mend(change, made.needed) for change, made in tried if made.fits), None) for tried in (changed, spread)
    )
    return [mend for mend in first if mend]


def _lighter(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield (change, config) with less memory, the cheapest change first.

    First come smaller batches, more sharding (more communication) and activation checkpointing (a third more
    arithmetic), alone and together; then offloading to the host, where the optimizer's step then runs.
    """
    settings, basic = config.engine.settings, dict[str, Change]()
    if config.recover.micro_batch > 1:
        basic["recover.micro_batch=1"] = lambda config: _with(config, "recover", micro_batch=1)
    if config.evaluation.batch > 1:
        basic["evaluation.batch=1"] = lambda config: _with(config, "evaluation", batch=1)
    if getattr(settings, "replicas", 1) > 1:
        basic["engine.replicas=1"] = lambda config: _with_engine(config, replicas=1)
    if not settings.activation_checkpointing:
        basic["engine.activation_checkpointing=true"] = lambda config: _with_engine(
            config, activation_checkpointing=True
        )
    for change, make in basic.items():
        yield change, make(config)
    lightest = functools.reduce(lambda config, make: make(config), basic.values(), config)
    if len(basic) > 1:
        yield " ".join(basic), lightest
    yield from _on_host([], config)
    if basic:
        yield from _on_host(list(basic), lightest)


def _on_host(given: list[str], config: Config) -> Iterator[tuple[str, Config]]:
    """Yield `config` with the optimizer on the host, then with the parameters there too, by ZeRO-3.

    `given` holds the changes that `config` already has.
    """
    if config.engine.name != "zero3":
        given = [change for change in given if change != "engine.replicas=1"] + ["engine=zero3"]
        config = replace(config, engine=_zero3(config.engine.settings))
    for key in ("offload_optimizer", "offload_params"):
        if getattr(config.engine.settings, key) == "none":
            given.append(f"engine.{key}=cpu")
            config = _with_engine(config, **{key: "cpu"})
            yield " ".join(given), config


def _with(config: Any, section: str, **values: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def _with_engine(config: Config, **settings: Any) -> Config:
    return _with(config, "engine", settings=replace(config.engine.settings, **settings))


def _zero3(settings: Any) -> Chosen:
    """ZeRO-3 with its default settings, and with the dtype and checkpointing of another engine's `settings`."""
    values = yaml.safe_load((CONF / "engine" / "zero3.yaml").read_text())
    name = values.pop("name")
    values |= {"dtype": settings.dtype, "activation_checkpointing": settings.activation_checkpointing}
    return Chosen(name, ENGINES.settings_of(name)(**values))

"""Memory of the passes over calibration text before a stage is factored, traced on the meta device."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from plrd_train.compress.blocks import blocks_of
from plrd_train.compress.collect import collect
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import owners
from plrd_train.config.schema import Config
from plrd_train.plan.trace import Event, computing_in, trace_evaluation


@dataclass(frozen=True)
class Window:
    """A pass that collects the statistics of the Linears `names`.

    events: the trace. sums: bytes of the running sums. owns: for each rank, bytes of the statistics that it owns
    afterwards. The windows of a model are similar in size; this is the first.
    """

    names: tuple[str, ...]
    events: Sequence[Event]
    sums: int
    owns: Sequence[int]


@dataclass(frozen=True)
class Walk:
    """Bytes of a walk through the blocks in float32 on one rank.

    states: the hidden states of its text. runs: the activations of one block and batch in a forward. keeps: the
    activations of one block and batch that are kept for a backward.
    """

    states: int
    runs: int
    keeps: int


@dataclass(frozen=True)
class Text:
    """The passes over text before factoring: for statistics, for losses, and block by block. None: no such pass."""

    window: Window | None = None
    measuring: Sequence[Event] | None = None
    walk: Walk | None = None


def passes(
    config: Config, model: PreTrainedModel, shapes: Mapping[str, Shape], todo: Collection[str], world_size: int
) -> Text:
    """The passes before the Linears `todo` of `model` are factored.

    `shapes` holds all Linears that can be factored. `model` is in evaluation mode and has the engine's compute dtype.
    """
    needs, found = config.compressor().needs(), Text()
    if not todo:
        return found
    if needs.statistic is not None:
        found = dataclasses.replace(
            found, window=_window(config, model, shapes, shapes if needs.spectra else todo, world_size)
        )
    if needs.losses:
        batch = _batches(config, config.ranks.settings.tokens, world_size)[0]
        found = dataclasses.replace(found, measuring=trace_evaluation(model, lambda model: _loss(model, batch)))
    if needs.in_order:
        with computing_in(model, torch.float32):
            found = dataclasses.replace(found, walk=_walk(config, model, world_size))
    return found


def _window(
    config: Config, model: PreTrainedModel, shapes: Mapping[str, Shape], names: Collection[str], world_size: int
) -> Window:
    method, first = config.factorizer.settings, list[Any]()
    batch = _batches(config, method.calibration_tokens, world_size)[0]

    def look(model: nn.Module) -> None:
        first.append(next(collect(_OnMeta(model), method.statistic, shapes, names, [batch])))  # type: ignore[arg-type]  # nothing is gathered

    events = trace_evaluation(model, look)
    ((part, statistics),) = first
    # The pass begins at the last forward. An earlier one, of two tokens, finds the Linears that share an input.
    begin = max(i for i, event in enumerate(events) if (event.kind, event.name) == ("forward", ""))
    sums = _size(statistics, part)
    passing = [
        dataclasses.replace(event, peak=max(event.peak - sums, 0), live=max(event.live - sums, 0))
        for event in events[begin:]
    ]
    owner = owners(shapes, part, world_size)
    return Window(
        tuple(part),
        passing,
        sums,
        [_size(statistics, [name for name in part if owner[name] == rank]) for rank in range(world_size)],
    )


def _walk(config: Config, model: PreTrainedModel, world_size: int) -> Walk:
    batches, states = _batches(config, config.factorizer.settings.calibration_tokens, world_size), list[Tensor]()

    def run(model: nn.Module) -> None:
        states.append(model.base_model(input_ids=batches[0], use_cache=False).last_hidden_state)  # type: ignore[operator]

    def run_and_keep(model: nn.Module) -> None:
        with torch.enable_grad():
            run(model)

    runs, names = max(event.peak for event in trace_evaluation(model, run)), list(blocks_of(model))
    ends = [
        event.live
        for event in trace_evaluation(model, run_and_keep)
        if event.kind == "forwarded" and event.name in names
    ]
    return Walk(states[0].nbytes * sum(map(len, batches)) // len(batches[0]), runs, ends[-1] // len(names))


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of plrd_train.compress.losses."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def _batches(config: Config, tokens: int | None, world_size: int) -> Sequence[Tensor]:
    """The first rank's share of `tokens` tokens of text, in micro-batches (n, seq_len) on the meta device."""
    sequences = -(-((tokens or 0) // config.data.seq_len) // world_size)
    return torch.zeros(sequences, config.data.seq_len, dtype=torch.long, device="meta").split(
        config.recover.micro_batch
    )


def _size(statistics: Mapping[str, Tensor], names: Collection[str]) -> int:
    """Bytes of the statistics of `names`. Linears with the same input share a statistic, which counts once."""
    return sum({id(statistics[name]): statistics[name].nbytes for name in names}.values())


@dataclass(frozen=True)
class _OnMeta:
    """The members of an engine that `collect` uses, for one rank on the meta device."""

    model: nn.Module
    rank: int = 0
    world_size: int = 1

    @property
    def device(self) -> torch.device:
        return torch.device("meta")

    def share(self, value: object) -> list:
        return [value]

"""The models of a run on the meta device: the parent and the member of each stage."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from plrd_train.compress.contracts import AllocationError
from plrd_train.compress.ranks import Shape, ratio_of
from plrd_train.compress.rounds import changes
from plrd_train.config.schema import Config
from plrd_train.errors import UserError
from plrd_train.parents.modeling_plrd import model_ranks
from plrd_train.parents.models import build_model
from plrd_train.parents.reach import check_in_order, check_lengths, shapes_of
from plrd_train.plan.calibration import Text, passes
from plrd_train.plan.trace import Event, computing_in, trace_evaluation, trace_step
from plrd_train.structure import Structure


@dataclass(frozen=True)
class Planned:
    """A model of the run.

    name: of the member, or "parent". shapes: its eligible Linears before factoring. ranks: their ranks afterwards.
    training, evaluation: traces of one micro-batch; training is empty for a parent that is not trained. text: the
    passes of the model before it over calibration text, for its factorization.
    """

    name: str
    ratio_requested: float
    ratio: float
    linear_params: int
    tokens: int
    shapes: dict[str, Shape]
    ranks: dict[str, int]
    structure: Structure
    training: Sequence[Event]
    evaluation: Sequence[Event]
    text: Text

    @property
    def params(self) -> int:
        """Parameters as the form stores them; `structure` counts pairs of factors."""
        pairs = ((shape, self.ranks.get(name)) for name, shape in self.shapes.items())
        return self.structure.numel - sum(shape.pair_params(rank) - shape.params(rank) for shape, rank in pairs)


def planned(config: Config, parent: PreTrainedConfig, world_size: int) -> Iterator[Planned]:
    """Yield the parent and the members of the run, in order.

    The ranks are those of `ranks=uniform`, which need no weights; other allocations have the same sum of parameters.
    Raises UserError if the config cannot be applied to this parent.
    """
    linears, scratch, path = config.linears, config.parent.scratch, config.parent.path
    ranks = model_ranks(parent)
    model = _on_meta(config, parent, None)
    check_lengths(parent, {"data.seq_len": config.data.seq_len, "evaluation.context": config.evaluation.context}, path)
    compressor = config.compressor()
    if compressor.needs().in_order:
        check_in_order(parent, config.factorizer.name, path)
    shapes = shapes_of(model, parent, linears.include, linears.exclude, path, config.form.name)
    now = {name: shape.rank for name, shape in shapes.items() if shape.rank is not None}
    whole = Planned(
        "parent",
        1.0,
        ratio_of(shapes, now),
        _linear_params(shapes, now),
        scratch.tokens if scratch else 0,
        {},
        now,
        *_parts(model),
        Text(),
    )
    yield _traced(config, whole, model, world_size, train=scratch is not None)
    for ratio, tokens in zip(config.stages.ratios, config.stages.budgets(), strict=True):
        try:
            wanted = compressor.even(shapes, ratio)
        except AllocationError as error:
            raise UserError(str(error)) from None
        with _tracing(config, model):
            text = passes(config, model, shapes, changes(shapes, wanted), world_size)
        ranks = {**ranks, **wanted}
        model = _on_meta(config, parent, ranks)
        member = Planned(
            f"{ratio:g}x",
            ratio,
            ratio_of(shapes, wanted),
            _linear_params(shapes, wanted),
            tokens,
            shapes,
            wanted,
            *_parts(model),
            text,
        )
        yield _traced(config, member, model, world_size, train=True)
        shapes = {name: dataclasses.replace(shape, rank=wanted.get(name, shape.rank)) for name, shape in shapes.items()}


def traced_as(config: Config, world_size: int) -> tuple[Any, ...]:
    """The settings that determine the traces of a model: plans that agree in them share traces."""
    settings, batches = config.engine.settings, (micro_batch(config, world_size), config.evaluation.batch)
    return (
        settings.dtype,
        settings.activation_checkpointing,
        batches,
        world_size if config.compressor().needs().text else None,
    )


def micro_batch(config: Config, world_size: int) -> int:
    """Sequences in one micro-batch of a rank."""
    return min(config.recover.micro_batch, -(-sequences(config) // world_size))


def sequences(config: Config) -> int:
    """Sequences of one optimizer step, over all ranks."""
    return config.recover.global_batch_tokens // config.data.seq_len


def _parts(model: PreTrainedModel) -> tuple[Structure, Sequence[Event], Sequence[Event]]:
    return Structure.of(model), (), ()


def _linear_params(shapes: dict[str, Shape], ranks: dict[str, int]) -> int:
    return sum(shape.params(ranks.get(name)) for name, shape in shapes.items())


def _on_meta(config: Config, parent: PreTrainedConfig, ranks: dict[str, int] | None) -> PreTrainedModel:
    # All fused attentions are traced alike, so their kernels need not be installed.
    attention = "eager" if config.parent.attention == "eager" else None
    with torch.device("meta"):
        return build_model(parent, ranks, attention)


@contextmanager
def _tracing(config: Config, model: PreTrainedModel) -> Iterator[None]:
    """Put `model` in evaluation mode and in the engine's compute dtype. Errors of the trace become UserError."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.engine.settings.dtype]
    model.eval()
    try:
        with computing_in(model, dtype), warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"parent {config.parent.path}: {type(model).__name__} does not run on the meta device, so it cannot be "
            f"planned ({reason})"
        ) from error


def _traced(config: Config, planned: Planned, model: PreTrainedModel, world_size: int, *, train: bool) -> Planned:
    """`planned` with its traces: a training step with the config's objective, and an evaluation."""
    training: Sequence[Event] = ()
    with _tracing(config, model):
        ids = torch.zeros(config.evaluation.batch, config.evaluation.context, dtype=torch.long, device="meta")
        evaluation = trace_evaluation(model, lambda model: _negative_log_likelihood(model, ids))
        if train:
            model.train()
            if config.engine.settings.activation_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            ids = torch.zeros(micro_batch(config, world_size), config.data.seq_len, dtype=torch.long, device="meta")
            # A teacher that the objective asks for is not in the plan: here it is the model itself.
            terms = config.objective.settings.open(lambda: model)
            training = trace_step(model, lambda model: sum(terms(model, ids).values()))
    return dataclasses.replace(planned, training=training, evaluation=evaluation)


def _negative_log_likelihood(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of plrd_train.evaluate.perplexity, per token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")

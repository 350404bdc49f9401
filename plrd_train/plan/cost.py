"""What a run costs beside memory: floating-point operations, hours, disk, and the time that a stop needs. Each
assumption is a field of Machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from plrd_train.config.schema import Config
from plrd_train.plan.models import Planned, sequences
from plrd_train.recover.perf import PEAKS, Perf

GB = 1e9
# Memory of one device in GB (vendor data sheets); what computes without a known peak is "cpu".
DEVICES = {"H100": 80.0, "H200": 141.0, "A100": 80.0, "L40S": 48.0, "MI300X": 192.0}
CONTEXT = 3.0 * GB  # CUDA's context, cuBLAS' workspace and NCCL's buffers; from experience elsewhere, not measured here
FRAGMENTATION = 0.1  # of the tensors: what PyTorch's caching allocator holds beyond them; the same
STEPS_TO_STOP = 2  # a stop is agreed on while the next step is computed
STOP_MARGIN_S = 60.0  # for the scheduler, which looks at its limits every 30 s, and for the end of the processes


@dataclass(frozen=True)
class Machine:
    """Where a run is planned for. `device` is a key of DEVICES or "cpu"; `memory` bytes of one device (None: not
    known); `mfu` the share of the peak that a training step reaches; `disk` bytes a second that all ranks together
    write or read."""

    world_size: int
    nodes: int
    device: str
    memory: float | None
    mfu: float
    disk: float

    @property
    def kind(self) -> str:
        return "cpu" if self.device == "cpu" else "cuda"

    @property
    def peak(self) -> float | None:
        """FLOP/s of one device."""
        return PEAKS.get(self.device)

    def seconds(self, flops: float) -> float | None:
        """Time of `flops` on all devices; None where their speed is not known."""
        return flops / (self.mfu * self.peak * self.world_size) if self.peak else None

    def needed(self, tensors: float) -> float:
        """Bytes of a device of which `tensors` bytes are tensors."""
        return tensors if self.kind == "cpu" else tensors * (1 + FRAGMENTATION) + CONTEXT


@dataclass(frozen=True)
class Checkpoints:
    """Bytes of the largest checkpoint over all ranks and of `run_dir` at its fullest; seconds to write one and read it
    back for its checksums, and between the request to stop and the end of the processes, rounded up to ten (without the
    steps where their speed is not known)."""

    size: float
    disk: float
    seconds: float
    stop_seconds: int


def training_flops(config: Config, parent: PreTrainedConfig, model: Planned) -> float:
    """Forward and backward over the stage's tokens; recomputation by activation checkpointing is not counted, as in
    `perf/mfu`."""
    return _flops_per_token(parent, model, config.data.seq_len) * model.tokens


def evaluation_flops(config: Config, parent: PreTrainedConfig, models: Sequence[Planned]) -> float:
    """Forwards: once over the parent, and twice over each member, at most `evaluation.tokens` tokens each."""
    passes = [1] + [2] * (len(models) - 1)
    per_token = (_flops_per_token(parent, model, config.evaluation.context) / 3 for model in models)
    return sum(count * flops * config.evaluation.tokens for count, flops in zip(passes, per_token, strict=True))


def _flops_per_token(parent: PreTrainedConfig, model: Planned, seq_len: int) -> float:
    text = parent.get_text_config()
    return Perf.of_model(
        model.structure.numel, text.num_hidden_layers, text.hidden_size, seq_len, 1, torch.device("cpu")
    ).flops_per_token


def checkpoints(
    config: Config, parent: PreTrainedConfig, models: Sequence[Planned], machine: Machine, published_width: int
) -> Checkpoints:
    """A stage that is under way is saved with the state of its optimizer (with AdamW 12 bytes a parameter in all), and
    with its trunk where that trains a branch; its end with the model, and with the member where that is not the
    trunk."""
    group, branch = config.optimizer.settings.group, config.branches()

    def saved(model: Planned) -> int:
        return 4 * sum(p.numel * (1 + branch + len(group(p).state)) for p in model.structure.parameters)

    trained = models if models[0].training else models[1:]
    size = max((saved(model) for model in trained), default=0)
    published = sum(published_width * model.params for model in models[1:])
    seconds = 2 * size / machine.disk
    step_tokens = sequences(config) * config.data.seq_len
    steps = [machine.seconds(_flops_per_token(parent, model, config.data.seq_len) * step_tokens) for model in trained]
    slowest = max((step for step in steps if step is not None), default=0.0)
    stop = STEPS_TO_STOP * slowest + 2 * seconds + STOP_MARGIN_S
    ends = sum(4 * (2 if config.branches() else 1) * model.structure.numel for model in models[1:])  # which stay
    return Checkpoints(size, (config.checkpoint.keep + 1) * size + ends + published, seconds, 10 * math.ceil(stop / 10))

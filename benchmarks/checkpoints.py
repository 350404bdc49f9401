"""What saving costs the step loop: steps with a checkpoint of the stage under way every 20 of them, against steps with
none. A parent of 3M parameters, random weights, one rank."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from benchmarks import Row
from plrd_train.data.loader import Batch
from plrd_train.engine.fsdp import Options, open_engine
from plrd_train.parents.models import HubArchitecture
from plrd_train.recover.checkpoint import Checkpoints
from plrd_train.recover.guard import Guard, Judged
from plrd_train.recover.loop import Recipe, Trainer
from plrd_train.recover.objectives.ce import Objective
from plrd_train.recover.optimizers.adamw import Optimizer
from plrd_train.recover.pauses import Pauses
from plrd_train.recover.progress import Counters, Progress, UnderWay
from plrd_train.recover.schedules.constant import Schedule
from plrd_train.recover.settings import Checkpoint, Recover
from plrd_train.runtime.exchange import Exchange
from plrd_train.runtime.place import Place
from plrd_train.runtime.stop import StopRequest
from plrd_train.runtime.world import World
from plrd_train.scratch import RandomWeights

CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=6,
)
SEQ_LEN, SEQUENCES = 256, 4
EVERY, STEPS, ROUNDS = 20, 60, 3


class _Text:
    """A loader of random tokens, which costs nothing."""

    epoch = 0

    def next(self, sequences: int) -> Batch:
        return Batch(torch.randint(3, CONFIG.vocab_size, (sequences, SEQ_LEN)), {}, 0)

    def share(self, first: int, sequences: int, rank: int) -> int:
        return sequences


def rows() -> Iterator[Row]:
    world = World.open(Place())
    try:
        yield _row(world)
    finally:
        world.close()


def _row(world: World) -> Row:
    engine = open_engine(Options(dtype="fp32", replicas=1, activation_checkpointing=False, compile=False), world)
    engine.load(HubArchitecture(CONFIG), RandomWeights(CONFIG, 0))
    taken: dict[int | None, list[float]] = {None: [], EVERY: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):  # by turns, so that what else the machine does meets both alike
            for every in taken:
                taken[every].append(_seconds(engine, every, Path(folder)))
    ours, other = min(taken[EVERY]), min(taken[None])
    parameters = sum(
        parameter.numel() for parameter in engine.model.parameters() if isinstance(parameter, nn.Parameter)
    )
    return Row(
        f"a step, with a checkpoint every {EVERY}",
        ours,
        other,
        "s",
        f"{parameters / 1e6:.1f}M parameters, {SEQUENCES * SEQ_LEN} tokens",
    )


def _seconds(engine, every: int | None, folder: Path) -> float:
    """Seconds a step, from the end of the first to that of the last; what is still being written then goes on, as it
    does in a run."""
    settings = Recover(
        lr=1e-4,
        clip=1.0,
        spike=None,
        patience=1,
        global_batch_tokens=SEQUENCES * SEQ_LEN,
        micro_batch=SEQUENCES,
    )
    ends: list[float] = []
    checkpoints, exchange = Checkpoints(folder, engine, keep=2), Exchange(engine.world)
    counters, guard = Counters(), Guard(settings, print, Judged())

    def progress(steps: int, in_branch: bool) -> Progress:
        return Progress(counters=counters.now(), under_way=UnderWay(None, {}, steps))

    asked = Checkpoint(tokens=every * SEQUENCES * SEQ_LEN if every else None, minutes=None, keep=2)
    pauses = Pauses(asked, StopRequest(), checkpoints, progress)
    optimizer = Optimizer(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    recipe = Recipe(Objective().open(nn.Module), Schedule(warmup=0.0, branch=0.0), optimizer, settings, SEQ_LEN, seed=0)
    text: Any = _Text()
    trainer = Trainer(
        engine, text, recipe, counters, guard, exchange, lambda metrics, seconds: ends.append(time.perf_counter())
    )
    trainer.recover(STEPS * SEQUENCES * SEQ_LEN, 1e-4, pauses)
    checkpoints.wait()
    checkpoints.close()
    exchange.close()
    return (ends[-1] - ends[0]) / (len(ends) - 1)

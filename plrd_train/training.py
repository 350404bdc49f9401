"""Training within a run: the loader of `data` and the loop of `recover`, with progress on the console and a record of
each step."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from plrd_train.config.schema import Config
from plrd_train.data.calibration import calibration_batches
from plrd_train.data.corpus import Corpus
from plrd_train.data.loader import Loader
from plrd_train.engine import Engine
from plrd_train.recover.checkpoint import Snapshot
from plrd_train.recover.guard import Guard
from plrd_train.recover.loop import Recipe, Recovered, Trainer
from plrd_train.recover.pauses import Pauses
from plrd_train.recover.perf import Perf
from plrd_train.recover.progress import Counters
from plrd_train.runtime.exchange import Exchange
from plrd_train.runtime.world import World
from plrd_train.tracking import console
from plrd_train.tracking.tracker import Tracker


def open_loader(config: Config, world: World, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Loader:
    """The training text from its beginning, this rank's share."""
    data = config.data
    return Loader(
        corpus,
        tokenizer,
        seq_len=data.seq_len,
        streams=data.streams,
        seed=config.seed,
        append_eos=data.append_eos,
        rank=world.rank,
        world_size=world.size,
        skip_bad=data.skip_bad,
    )


def calibration_text(
    config: Config, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, tokens: int, rank: int, world_size: int
) -> list[Tensor]:
    """That much calibration text, this rank's share (`plrd_train.data.calibration`). Not a collective."""
    data = config.data
    return calibration_batches(
        corpus,
        tokenizer,
        tokens=tokens,
        seq_len=data.seq_len,
        streams=data.streams,
        seed=config.seed,
        append_eos=data.append_eos,
        rank=rank,
        world_size=world_size,
        batch=config.recover.micro_batch,
        skip_bad=data.skip_bad,
    )


@dataclass(frozen=True)
class Job:
    """What is opened once for a run, and trains every stage of it. `model_config` is that of the model's architecture;
    `teacher()` opens an engine with the parent, frozen, for an objective that asks for it, a collective."""

    config: Config
    engine: Engine
    model_config: PreTrainedConfig
    loader: Loader
    counters: Counters
    tracker: Tracker
    teacher: Callable[[], Engine]


@dataclass(frozen=True)
class Budget:
    """What differs from stage to stage: a title for the console, the tokens, the peak learning rate, and metrics that
    go into the record of each step."""

    title: str
    tokens: int
    peak: float
    metrics: Mapping[str, float]


def train(
    job: Job, budget: Budget, guard: Guard, pauses: Pauses, done: int = 0, trunk: Snapshot | None = None
) -> Recovered:
    """Train the engine's model on `budget`, of which `done` steps are made already; see `Trainer.recover`. A
    collective."""
    config, engine, loader = job.config, job.engine, job.loader
    text, seq_len = job.model_config.get_text_config(), config.data.seq_len
    perf = Perf.of_model(
        engine.params(), text.num_hidden_layers, text.hidden_size, seq_len, engine.world_size, engine.device
    )
    teachers: list[Engine] = []  # an engine frees its model when it is freed itself

    def teacher() -> nn.Module:
        teachers.append(job.teacher())
        return teachers[-1].model

    objective = config.objective.settings.open(teacher)
    schedule, optimizer = config.schedule.settings, config.optimizer.settings
    recipe = Recipe(objective, schedule, optimizer, config.recover, seq_len, config.seed)
    epoch = loader.epoch
    with console.progress(budget.title, budget.tokens, "tokens") as bar, closing(Exchange(engine.world)) as exchange:

        def on_step(metrics: dict[str, float], seconds: float) -> None:
            nonlocal epoch
            job.tracker.log({**metrics, **perf.of(recipe.step_tokens, seconds), **budget.metrics})
            bar.update(recipe.step_tokens, loss=metrics["train/loss"], lr=metrics["train/lr"])
            if metrics["data/epoch"] > epoch:
                epoch = int(metrics["data/epoch"])
                console.say(
                    f"data.train holds fewer tokens than the budget: epoch {epoch + 1} of it begins, in another order"
                )

        trainer = Trainer(engine, loader, recipe, job.counters, guard, exchange, on_step)
        bar.update(done * recipe.step_tokens)
        return trainer.recover(budget.tokens, budget.peak, pauses, done, trunk)

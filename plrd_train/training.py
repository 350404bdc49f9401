"""Training as a run does it: the loader and loop of `data` and `recover`, with progress on the console and a record of
each step."""

from collections.abc import Callable, Mapping
from contextlib import closing

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from plrd_train.config.schema import Config
from plrd_train.data.calibration import calibration_batches
from plrd_train.data.corpus import Corpus
from plrd_train.data.loader import Loader
from plrd_train.engine import Engine
from plrd_train.recover.checkpoint import Snapshot
from plrd_train.recover.guard import Guard
from plrd_train.recover.loop import Recovered, Trainer
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


def train(
    config: Config,
    engine: Engine,
    architecture: PreTrainedConfig,
    loader: Loader,
    counters: Counters,
    tracker: Tracker,
    pauses: Pauses,
    guard: Guard,
    *,
    title: str,
    tokens: int,
    peak: float,
    fields: Mapping[str, float],
    teacher: Callable[[], nn.Module],
    done: int = 0,
    trunk: Snapshot | None = None,
) -> Recovered:
    """Train the engine's model on `tokens` tokens at the peak learning rate `peak`, of which `done` steps are made
    already (see `Trainer.recover`); `fields` go into the record of each step, and `teacher` opens the parent for an
    objective that asks for it."""
    text, seq_len = architecture.get_text_config(), config.data.seq_len
    perf = Perf.of_model(
        engine.params(), text.num_hidden_layers, text.hidden_size, seq_len, engine.world_size, engine.device
    )
    epoch = loader.epoch
    with console.progress(title, tokens, "tokens") as bar, closing(Exchange(engine.world)) as exchange:

        def on_step(metrics: dict[str, float]) -> None:
            nonlocal epoch
            tracker.log({**metrics, **fields})
            bar.update(trainer.step_tokens, loss=metrics["train/loss"], lr=metrics["train/lr"])
            if metrics["data/epoch"] > epoch:
                epoch = int(metrics["data/epoch"])
                console.say(
                    f"data.train holds fewer tokens than the budget: epoch {epoch + 1} of it begins, in another order"
                )

        trainer = Trainer(
            engine,
            loader,
            config.objective.settings.open(teacher),
            config.schedule.settings,
            config.optimizer.settings,
            config.recover,
            seq_len,
            config.seed,
            perf,
            counters,
            guard,
            exchange,
            on_step,
        )
        bar.update(done * trainer.step_tokens)
        return trainer.recover(tokens, peak, pauses, done, trunk)

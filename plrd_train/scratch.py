"""A parent trained from random weights, by the same loop as every stage: the paper's baseline, and the quickstart's
parent."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from plrd_train.config.schema import Config
from plrd_train.data.corpus import Corpus
from plrd_train.data.embedded import train_tokenizer
from plrd_train.data.loader import merge_positions
from plrd_train.engine import Engine
from plrd_train.errors import UserError
from plrd_train.parents.models import HubArchitecture, build_model, check_attention, scratch_config
from plrd_train.parents.parent import Parent
from plrd_train.parents.settings import Scratch
from plrd_train.publish.members import write_model
from plrd_train.recover.checkpoint import Checkpoints
from plrd_train.recover.guard import Guard, Judged
from plrd_train.recover.pauses import Pauses
from plrd_train.recover.progress import Progress, UnderWay
from plrd_train.runtime.stop import StopRequest
from plrd_train.runtime.world import SharedError, World
from plrd_train.tracking import console
from plrd_train.tracking.tracker import open_tracker
from plrd_train.training import Budget, Job, open_loader, train

CARD = """---
library_name: transformers
---
# A parent trained from scratch

{params:,} parameters, {tokens:,} tokens of `{corpus}`, by plrd_train.
A small model for trying things out: it is good for nothing else.
"""


class RandomWeights:
    """The initial values that transformers gives a model of `config`, one module at a time, the same on any number of
    ranks."""

    def __init__(self, config: PreTrainedConfig, seed: int):
        with torch.device("meta"):
            self._model: PreTrainedModel = build_model(config)
        self._seeds = {name: seed * 1_000_003 + i for i, (name, _) in enumerate(self._model.named_modules())}
        self._filled: tuple[str, dict[str, Tensor]] = ("", {})

    def shape(self, name: str) -> torch.Size:
        return self._model.get_parameter(name).shape

    @torch.no_grad()
    def read(self, name: str, rows: slice) -> Tensor:
        module_name, _, leaf = name.rpartition(".")
        if self._filled[0] != module_name:
            module = self._model.get_submodule(module_name)
            values = {key: nn.Parameter(torch.zeros(p.shape)) for key, p in module.named_parameters(recurse=False)}
            meta = dict(module._parameters)
            module._parameters.update(values)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seeds[module_name])
                self._model._init_weights(module)
            module._parameters.update(meta)
            self._filled = (module_name, {key: value.detach() for key, value in values.items()})
        return self._filled[1][leaf][rows]


def train_parent(config: Config, world: World, engine: Engine, corpus: Corpus, request: StopRequest) -> None:
    """Train the parent that `parent.scratch` describes and publish it as `parent.path`, a plain Hugging Face folder.
    An existing folder is kept. A stopped training resumes from its checkpoint, as a stage does. Raises Stopped if
    `request` asks for that."""
    scratch, folder, home = config.parent.scratch, Path(config.parent.path), Path(config.run_dir) / "scratch"
    assert scratch is not None
    if world.on_main(folder.exists):
        return
    tokenizer_folder = folder.with_name(folder.name + "-tokenizer")
    tokenizer = world.on_main(lambda: _tokenizer(scratch, config, tokenizer_folder))
    model_config = world.on_main(lambda: _architecture(scratch, tokenizer))
    world.on_all(lambda: check_attention(model_config, config.parent.attention))
    architecture = HubArchitecture(model_config, attention=config.parent.attention)
    checkpoints = Checkpoints(home / "checkpoints", engine, config.checkpoint.keep)
    loader = world.on_all(lambda: open_loader(config, world, corpus, tokenizer))
    tracker = open_tracker(config, world, home, scratch.tokens)
    trunk, progress, judged = None, checkpoints.latest(), Judged()
    if progress is None:
        progress = Progress()
        engine.load(architecture, RandomWeights(model_config, config.seed))
    else:
        trunk = checkpoints.load_stage(progress, architecture, config.optimizer.settings)
        assert progress.position is not None and progress.under_way is not None
        judged = progress.under_way.judged
        loader.seek(progress.position)
    counters, done = progress.counters.now(), progress.counters.steps
    tracker.rewind(done)
    guard = Guard(config.recover, console.say, judged)

    def progress_after(steps: int, in_branch: bool) -> Progress:
        position = merge_positions(world.share(loader.position()))
        under_way = UnderWay(
            entry=None, ranks={}, steps=steps, in_branch=in_branch, judged=dataclasses.replace(guard.judged)
        )
        return Progress(counters=counters.now(), position=position, under_way=under_way)

    try:
        job = Job(config, engine, model_config, loader, counters, tracker, _no_teacher)
        budget = Budget("train the parent", scratch.tokens, scratch.lr, {"stage/index": 0, "stage/ratio": 1.0})
        pauses = Pauses(config.checkpoint, request, checkpoints, progress_after)
        trained = train(job, budget, guard, pauses, done, trunk)
        checkpoints.wait()
    finally:
        loader.close()
        checkpoints.close()
        tracker.close()
    if trained.member is not None:
        engine.restore(trained.member)
    card = CARD.format(params=engine.params(), tokens=scratch.tokens, corpus=config.data.train)
    source = Parent(config.parent.path, None, str(tokenizer_folder), {})
    write_model(engine, folder, config=model_config, ranks={}, dtype=torch.float32, parent=source, card=card)
    world.on_main(checkpoints.remove)


def _no_teacher() -> Engine:
    raise SharedError(
        "objective: a parent that is trained from scratch has no parent to learn from; train it with objective=ce, and "
        "then its family, with parent=hub, from its folder"
    )


def _tokenizer(scratch: Scratch, config: Config, folder: Path) -> PreTrainedTokenizerBase:
    if scratch.tokenizer is None:
        train_tokenizer(Path(config.data.train), folder, scratch.vocab_size)
    else:
        try:
            AutoTokenizer.from_pretrained(scratch.tokenizer).save_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(
                f"parent.scratch.tokenizer: {scratch.tokenizer} does not load ({str(error).splitlines()[0]})"
            ) from None
    return AutoTokenizer.from_pretrained(folder)


def _architecture(scratch: Scratch, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    values = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **scratch.architecture,
        "vocab_size": len(tokenizer),
    }
    return scratch_config(values)

"""One run: the parent, data, engine and records that the pipeline works on, opened from a config and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plrd_train.compress.factor_cache import FactorCache
from plrd_train.compress.ranks import Shape
from plrd_train.config import resolved
from plrd_train.config.schema import from_mapping
from plrd_train.data.corpus import overlap, resolve_corpus
from plrd_train.data.documents import EvalDocument, evaluation_documents
from plrd_train.data.embedded import write_corpus
from plrd_train.data.loader import merge_positions
from plrd_train.engine import Engine, open_engine
from plrd_train.family import Family
from plrd_train.parents.models import HubArchitecture, check_attention
from plrd_train.parents.parent import load_config, load_tokenizer, on_this_node, open_parent
from plrd_train.parents.reach import check_in_order, check_lengths, notes, shapes_of
from plrd_train.parents.tokenization import compare
from plrd_train.parents.weights import parent_dtype
from plrd_train.recover.checkpoint import Checkpoints
from plrd_train.recover.progress import Counters, Progress
from plrd_train.runtime.stop import Stopped, StopRequest
from plrd_train.runtime.world import SharedError, World
from plrd_train.scratch import train_parent
from plrd_train.tracking import console
from plrd_train.tracking.tracker import open_tracker
from plrd_train.training import open_loader


@dataclass(frozen=True)
class Stage:
    """One stage of the family: `index` counts from 1, `tokens` is its budget."""

    index: int
    ratio: float
    tokens: int

    @property
    def name(self) -> str:
        """The name of its member."""
        return f"{self.ratio:g}x"


class Run:
    """What `plrd_train.pipeline` works on. Opening it checks all input. Methods are collectives."""

    def __init__(self, source: Mapping[str, Any], world: World, request: StopRequest):
        """Open the run of the resolved mapping `source` (the shape of conf/config.yaml), anew or where it was stopped.
        Raises UserError, and Stopped if `request` asks for that while a parent is trained from scratch."""
        self.world, self.request = world, request
        before = world.on_main(lambda: resolved.read(Path(source["run_dir"])))
        source = resolved.pinned(dict(source), before)
        self.config = config = from_mapping(source)
        self.run_dir = run_dir = Path(config.run_dir)
        world.on_main(lambda: resolved.refuse_other(source, before, run_dir))
        self._check_config()
        budgets = config.stages.budgets()
        self.compressor = config.compressor()
        self.stages = [
            Stage(i, ratio, tokens)
            for i, (ratio, tokens) in enumerate(zip(config.stages.ratios, budgets, strict=True), 1)
        ]

        if config.data.embedded:
            world.on_main(lambda: write_corpus(Path(config.data.train).parent))
        self.engine: Engine = open_engine(config.engine.name, config.engine.settings, world)
        self.train = world.on_main(lambda: resolve_corpus(config.data.train, "train", config.data.revision))
        held_out = world.on_main(lambda: resolve_corpus(config.data.validation, "validation", config.data.revision))
        if world.is_main and (note := overlap(self.train, held_out, "trained on")):
            console.say(note)
        if config.parent.scratch is not None:
            train_parent(config, world, self.engine, self.train, request)
        self._open_parent()
        self.held_out: list[EvalDocument] = world.on_main(
            lambda: evaluation_documents(
                held_out, self.tokenizer, config.evaluation.context, config.evaluation.tokens, config.data.skip_bad
            )
        )
        pins = {"parent": self.parent.revision, "data": self.train.revision}
        world.on_main(lambda: resolved.refuse_moved(pins, before))
        source = {**source, **{group: {**source[group], "revision": revision} for group, revision in pins.items()}}
        world.on_main(lambda: resolved.write(source, run_dir))
        world.on_main(lambda: request.watch(run_dir / "stop"))

        self.found: Family | None = world.on_main(lambda: Family.find(run_dir))
        self.checkpoints = Checkpoints(run_dir / "checkpoints", self.engine, config.checkpoint.keep)
        self.kept = FactorCache(run_dir / "factors", world.device)
        self.counters = Counters()
        self.loader = world.on_all(lambda: open_loader(config, world, self.train, self.tokenizer))
        self.tracker = open_tracker(config, world, run_dir, sum(budgets))

    def _check_config(self) -> None:
        """Raise SharedError, on every rank alike, where this config cannot be run by these ranks."""
        config, size = self.config, self.world.size
        if config.data.streams < size:
            raise SharedError(
                f"data.streams: {config.data.streams} streams cannot feed {size} ranks; give at least that many"
            )
        for name, evaluator in config.evaluators.items():
            if evaluator.published:
                raise SharedError(
                    f"evaluation.{name}: it measures published models alone; leave it out, and measure the family with "
                    f"plrd evaluate {self.run_dir} --with {name}"
                )

    def _open_parent(self) -> None:
        config, world, remote_code = self.config.parent, self.world, self.config.parent.trust_remote_code
        parent = world.on_main(lambda: open_parent(config.path, config.revision or "main", remote_code))
        self.parent = world.node_by_node(lambda: on_this_node(parent, remote_code))
        self.tokenizer = world.on_all(lambda: load_tokenizer(self.parent, remote_code))
        world.on_main(lambda: compare(self.tokenizer, Path(self.parent.folder), self.train))
        self.parent_config = world.on_all(lambda: load_config(self.parent))
        world.on_all(lambda: check_attention(self.parent_config, config.attention))
        world.on_all(self._check_parent)
        self.dtype = world.on_main(lambda: parent_dtype(self.parent))

    def _check_parent(self) -> None:
        """Raise UserError where the config asks for what this parent cannot do, and print what of it stays whole."""
        config, hub_config, path = self.config, self.parent_config, self.config.parent.path
        check_lengths(
            hub_config, {"data.seq_len": config.data.seq_len, "evaluation.context": config.evaluation.context}, path
        )
        if self.compressor.needs().in_order:
            check_in_order(hub_config, config.factorizer.name, path)
        for note in (*self.parent.notes, *notes(hub_config, config.stages.ratios)):
            console.say(f"note: {note}")

    @property
    def family(self) -> Family:
        """Once `plrd_train.stages.resume` has found or begun it."""
        assert self.found is not None
        return self.found

    def load_trunk(self, progress: Progress) -> None:
        self.checkpoints.load(progress, self.architecture(progress.ranks))

    def architecture(self, ranks: Mapping[str, int] | None) -> HubArchitecture:
        """The parent's architecture with exactly these Linears low-rank; None: those of the parent itself."""
        return HubArchitecture(self.parent_config, ranks, self.config.parent.attention)

    def shapes(self) -> dict[str, Shape]:
        """The eligible Linears of the model in the engine."""
        linears, path = self.config.linears, self.config.parent.path
        chosen, form = (linears.include, linears.exclude), self.config.form.name
        return self.world.on_all(lambda: shapes_of(self.engine.model, self.parent_config, *chosen, path, form))

    def position(self) -> dict[str, Any]:
        """The data position over all ranks."""
        return merge_positions(self.world.share(self.loader.position()))

    def stop_if_asked(self, where: str) -> None:
        """Raise Stopped, on all ranks, if one of them was asked to stop."""
        if any(self.world.share(self.request.asked())):
            self.checkpoints.wait()
            raise Stopped(where)

    def close(self, exit_code: int = 0) -> None:
        """End the loader's thread and the records; the run can be opened again."""
        self.loader.close()
        self.checkpoints.close()
        self.tracker.close(exit_code)

"""One run: the parent, data, engine and records that the pipeline works on, opened from a config."""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from plrd_train.compress import forms
from plrd_train.compress.compressor import AllocationError, Source
from plrd_train.compress.kept import KeptFactors
from plrd_train.compress.packing import packed
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import Decomposed, DecompositionError
from plrd_train.config import resolved
from plrd_train.config.schema import from_mapping
from plrd_train.data.corpus import overlap, resolve_corpus
from plrd_train.data.documents import EvalDocument, evaluation_documents
from plrd_train.data.embedded import write_corpus
from plrd_train.data.loader import merge_positions
from plrd_train.engine import Engine, open_engine, rounded
from plrd_train.evaluate.perplexity import perplexity
from plrd_train.family import Family
from plrd_train.parents.modeling_plrd import model_ranks
from plrd_train.parents.models import HubArchitecture, check_attention
from plrd_train.parents.parent import load_config, load_tokenizer, on_this_node, open_parent
from plrd_train.parents.reach import check_in_order, check_lengths, notes, shapes_of
from plrd_train.parents.tokenization import compare
from plrd_train.parents.weights import WeightReader, parent_dtype
from plrd_train.publish.card import member_card
from plrd_train.publish.members import publish
from plrd_train.recover.checkpoint import Checkpoints, Snapshot
from plrd_train.recover.guard import Guard
from plrd_train.recover.loop import Recovered
from plrd_train.recover.pauses import Pauses
from plrd_train.recover.progress import Counters, Progress, UnderWay
from plrd_train.report.page import write_report
from plrd_train.report.signatures import signs
from plrd_train.runtime.stop import Stopped, StopRequest
from plrd_train.runtime.world import SharedError, World
from plrd_train.scratch import train_parent
from plrd_train.tracking import console
from plrd_train.tracking.rows import read_rows
from plrd_train.tracking.tracker import open_tracker
from plrd_train.training import calibration_text, open_loader, train


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
    """What `plrd_train.pipeline` works on. Opening it checks everything that can be wrong with the input; methods are
    collectives."""

    def __init__(self, source: Mapping[str, Any], world: World, request: StopRequest):
        """Open the run of the resolved mapping `source` (the shape of conf/config.yaml), anew or where it was stopped.
        Raises UserError, and Stopped if that is asked for by `request`."""
        self.world, self._request = world, request
        before = world.on_main(lambda: resolved.read(Path(source["run_dir"])))
        source = resolved.pinned(dict(source), before)
        self.config = config = from_mapping(source)
        self.run_dir = run_dir = Path(config.run_dir)
        world.on_main(lambda: resolved.refuse_other(source, before, run_dir))
        if config.data.streams < world.size:
            raise SharedError(
                f"data.streams: {config.data.streams} streams cannot feed {world.size} ranks; give at least that many"
            )
        budgets = config.stages.budgets()
        self.compressor = config.compressor()
        self.stages = [
            Stage(i + 1, ratio, tokens)
            for i, (ratio, tokens) in enumerate(zip(config.stages.ratios, budgets, strict=True))
        ]

        if config.data.embedded:
            world.on_main(lambda: write_corpus(Path(config.data.train).parent))
        self.engine: Engine = open_engine(config.engine.name, config.engine.settings, world)
        self._train = world.on_main(lambda: resolve_corpus(config.data.train, "train", config.data.revision))
        held_out = world.on_main(lambda: resolve_corpus(config.data.validation, "validation", config.data.revision))
        if world.is_main and (note := overlap(self._train, held_out, "trained on")):
            console.say(note)
        if config.parent.scratch is not None:
            train_parent(config, world, self.engine, self._train, request)
        remote_code = config.parent.trust_remote_code
        parent = world.on_main(lambda: open_parent(config.parent.path, config.parent.revision or "main", remote_code))
        self.parent = world.node_by_node(lambda: on_this_node(parent, remote_code))
        self.tokenizer = world.on_all(lambda: load_tokenizer(self.parent, remote_code))
        world.on_main(lambda: compare(self.tokenizer, Path(self.parent.folder), self._train))
        self._parent_config = world.on_all(lambda: load_config(self.parent))
        world.on_all(lambda: check_attention(self._parent_config, config.parent.attention))
        world.on_all(self._check_parent)
        self._dtype = world.on_main(lambda: parent_dtype(self.parent))
        self._held_out: list[EvalDocument] = world.on_main(
            lambda: evaluation_documents(
                held_out, self.tokenizer, config.evaluation.context, config.evaluation.tokens, config.data.skip_bad
            )
        )
        pins = {"parent": self.parent.revision, "data": self._train.revision}
        world.on_main(lambda: resolved.refuse_moved(pins, before))
        source = {**source, **{group: {**source[group], "revision": revision} for group, revision in pins.items()}}
        world.on_main(lambda: resolved.write(source, run_dir))
        world.on_main(lambda: request.watch(run_dir / "stop"))

        self.family: Family = world.on_main(lambda: Family.read(run_dir, must_exist=False))
        self.checkpoints = Checkpoints(run_dir / "checkpoints", self.engine, config.checkpoint.keep)
        self.kept = KeptFactors(run_dir / "factors", world.device)
        self.counters = Counters()
        self._texts: dict[tuple[int, int], list[Tensor]] = {}  # (stage, tokens) -> calibration text, of one stage
        self._branch_of: Snapshot | None = None  # the trunk, of a stage that goes on in its branch
        self._loader = world.on_all(lambda: open_loader(config, world, self._train, self.tokenizer))
        self._tracker = open_tracker(config, world, run_dir, sum(budgets))

    def _check_parent(self) -> None:
        """Raise UserError where this parent cannot be what the config asks for, and say what of it stays whole."""
        config, hub_config, path = self.config, self._parent_config, self.config.parent.path
        check_lengths(
            hub_config, {"data.seq_len": config.data.seq_len, "evaluation.context": config.evaluation.context}, path
        )
        if self.compressor.needs().in_order:
            check_in_order(hub_config, config.factorizer.name, path)
        for note in (*self.parent.notes, *notes(hub_config, config.stages.ratios)):
            console.say(f"note: {note}")

    # The trunk

    def resume(self) -> Progress:
        """Put into the engine what the run goes on from: the parent; or, of a stopped run, the last trunk, or the
        member that it had still to publish."""
        progress = self.checkpoints.latest()
        if progress is None:
            self.world.on_all(self._loader.check)
            progress = Progress(ranks=model_ranks(self._parent_config))
            self.engine.load(self.architecture(None), WeightReader(self.parent))
            self._tracker.rewind(0)
            if not self.family.parent:
                evaluated = self.evaluate("of the parent")
                self.family.parent = {
                    "path": self.config.parent.path,
                    "revision": self.parent.revision,
                    "params": self.engine.params(),
                    "eval": evaluated,
                }
                self.world.on_main(self.family.write)
            return progress
        if not self.family.parent:
            raise SharedError(
                f"{self.run_dir / 'family.json'}: lost, though checkpoints/ holds this run; restore it, or use "
                "another run_dir"
            )
        published = progress.entry is None or self.family.has(progress.entry["name"])
        if progress.under_way is not None:
            architecture = self.architecture(progress.under_way.ranks)
            self._branch_of = self.checkpoints.load_stage(progress, architecture, self.config.optimizer.settings)
        else:
            self.checkpoints.load(progress, self.architecture(progress.ranks), member=not published)
        if progress.position is not None:
            position = progress.position
            self.world.on_all(lambda: self._loader.seek(position))
        if progress.stages < len(self.stages):
            self.world.on_all(self._loader.check)
        self.counters = progress.counters.now()
        self._tracker.rewind(self.counters.steps)
        if published and self.world.is_main:
            write_report(self.run_dir)  # the run may have been stopped just before it
        return progress

    def load_trunk(self, progress: Progress) -> None:
        self.checkpoints.load(progress, self.architecture(progress.ranks))

    def architecture(self, ranks: Mapping[str, int] | None) -> HubArchitecture:
        """The parent's architecture with exactly these Linears low-rank; None: those of the parent itself."""
        return HubArchitecture(self._parent_config, ranks, self.config.parent.attention)

    def shapes(self) -> dict[str, Shape]:
        """The eligible Linears of the model in the engine."""
        linears, path = self.config.linears, self.config.parent.path
        chosen, form = (linears.include, linears.exclude), self.config.form.name
        return self.world.on_all(lambda: shapes_of(self.engine.model, self._parent_config, *chosen, path, form))

    def position(self) -> dict[str, Any]:
        """The data position over all ranks."""
        return merge_positions(self.world.share(self._loader.position()))

    # The stages

    @contextmanager
    def factoring(self, stage: Stage, linears: Collection[str]) -> Iterator[Callable[[Decomposed], None]]:
        """Show and record each Linear as it is factored."""
        with console.progress(f"stage {stage.index}: factor to {stage.ratio:g}x", len(linears), "weights") as bar:

            def on_done(done: Decomposed) -> None:
                bar.update(1, error=done.rel_error)
                self._tracker.log_event(
                    "factor",
                    {
                        "stage/index": stage.index,
                        "linear": done.name,
                        "rank": done.rank,
                        "factor/rel_error": done.rel_error,
                        "factor/seconds": done.seconds,
                    },
                )

            try:
                yield on_done
            except DecompositionError as error:
                raise SharedError(f"{self.config.parent.path}: {error}") from None
            except AllocationError as error:
                raise SharedError(str(error)) from None

    def source(self, stage: Stage, progress: Progress) -> Source:
        """The model in the engine, as the stage compresses it."""

        @contextmanager
        def shown(title: str, total: int) -> Iterator[Callable[[], object]]:
            with console.progress(f"stage {stage.index}: {title}", total, "weights") as bar:
                yield lambda: bar.update(1)

        in_float32 = dataclasses.replace(self.architecture(progress.ranks), attention=None)
        return Source(self.engine, in_float32, lambda tokens: self._text(stage, tokens), self.kept, shown)

    def _text(self, stage: Stage, tokens: int) -> list[Tensor]:
        """This rank's part of that much calibration text, which is read once in a stage. A collective."""
        if (stage.index, tokens) not in self._texts:
            self._texts = {key: text for key, text in self._texts.items() if key[0] == stage.index}
            self._texts[stage.index, tokens] = self._read_text(stage, tokens)
        return self._texts[stage.index, tokens]

    def _read_text(self, stage: Stage, tokens: int) -> list[Tensor]:
        world = self.world
        batches = world.on_all(
            lambda: calibration_text(self.config, self._train, self.tokenizer, tokens, world.rank, world.size)
        )
        read = sum(world.share(sum(batch.numel() for batch in batches)))
        self._tracker.log_event("calibration", {"stage/index": stage.index, "calibration/tokens": read})
        return batches

    def recover(self, stage: Stage, progress: Progress, under_way: UnderWay) -> tuple[Recovered, float]:
        """Train the trunk in the engine on the stage's budget, from where the stage stands. Returns with it the seconds
        of training, of earlier starts too. Raises Stopped if that is asked for."""
        peak = self.config.recover.peak_rate(self._parent_config.get_text_config().hidden_size)
        trunk, self._branch_of = self._branch_of, None
        guard = Guard(self.config.recover, console.say, under_way.judged)
        start = time.perf_counter() - under_way.seconds

        def progress_after(steps: int, in_branch: bool) -> Progress:
            judged = dataclasses.replace(guard.judged)
            now = dataclasses.replace(
                under_way, steps=steps, seconds=time.perf_counter() - start, in_branch=in_branch, judged=judged
            )
            return dataclasses.replace(progress, counters=self.counters.now(), position=self.position(), under_way=now)

        recovered = train(
            self.config,
            self.engine,
            self._parent_config,
            self._loader,
            self.counters,
            self._tracker,
            Pauses(self.config.checkpoint, self._request, self.checkpoints, progress_after),
            guard,
            title=f"stage {stage.index}: recover at {stage.ratio:g}x",
            tokens=stage.tokens,
            peak=peak,
            fields={"stage/index": stage.index, "stage/ratio": stage.ratio},
            teacher=self._teacher,
            done=under_way.steps,
            trunk=trunk,
        )
        return recovered, time.perf_counter() - start

    def _teacher(self) -> nn.Module:
        """The parent on an engine of its own, frozen. A collective."""
        engine = open_engine(self.config.engine.name, self.config.engine.settings, self.world)
        engine.load(self.architecture(None), WeightReader(self.parent))
        return engine.model.requires_grad_(False).eval()

    def stop_if_asked(self, where: str) -> None:
        """Raise Stopped, on all ranks, if one of them was asked to stop. A collective."""
        if any(self.world.share(self._request.asked())):
            self.checkpoints.wait()
            raise Stopped(where)

    def evaluate(self, when: str, stage: Stage | None = None) -> dict[str, Any]:
        """Held-out perplexity of the model in the engine, on its weights as they would be published."""
        with self._as_published():
            measured = perplexity(self.engine, self._held_out, self.config.evaluation.batch)
        console.say(f"perplexity {when}{f', {stage.ratio:g}x' if stage else ''}: {measured.ppl:.4g}")
        stage_index = stage.index if stage else 0
        self._tracker.log_event(
            "evaluation", {"stage/index": stage_index, "when": when, "val/loss": measured.loss, "val/ppl": measured.ppl}
        )
        return measured.to_dict()

    @contextmanager
    def _as_published(self) -> Iterator[None]:
        """Inside, the engine has the values that its model takes when published: packed by the form, and rounded."""
        form = self.config.form.name
        with rounded(self.engine, self._dtype, packed(self.engine, form) if forms.get(form).PACKS else ()):
            yield

    def publish(self, entry: dict[str, Any], ranks: Mapping[str, int]) -> None:
        """Write the model in the engine as the member of `entry`, and list it in family.json once its folder is whole.
        A member that is listed already, as when the run's checkpoints were lost, stays as it is."""
        self.world.on_main(self.kept.clear)  # its stage has a checkpoint
        if self.family.has(entry["name"]):
            return
        folder = self.family.member_folder(entry["name"])
        # It does where a run was stopped between its publication and family.json.
        if not self.world.on_main(folder.exists):
            card = member_card(entry, self.family.parent, dataclasses.asdict(self.config))
            settings = {
                "config": self._parent_config,
                "ranks": ranks,
                "form": self.config.form.name,
                "dtype": self._dtype,
            }
            with self._as_published():
                publish(self.engine, folder, **settings, parent=self.parent, card=card)
        self.family.members.append(entry)
        self.world.on_main(self.family.write)
        if self.world.is_main:
            write_report(self.run_dir)
            for sign in signs(self.family.parent, self.family.members, read_rows(self.run_dir / "metrics.jsonl")):
                if sign.stage == len(self.family.members):
                    console.say(f"note: {sign.words}")

    def close(self, exit_code: int = 0) -> None:
        """End the loader's thread and the records; the run can be opened again."""
        self._loader.close()
        self.checkpoints.close()
        self._tracker.close(exit_code)

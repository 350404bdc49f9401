"""Checkpoints: the trunk in float32, the state of the optimizer during a stage, and the progress of the run."""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from torch import Tensor

from plrd_train.compress.contracts import Architecture
from plrd_train.engine import Engine, Optimizer
from plrd_train.errors import UserError
from plrd_train.recover import saved
from plrd_train.recover.progress import Progress
from plrd_train.runtime.exchange import Exchange
from plrd_train.runtime.files import write_atomically
from plrd_train.runtime.world import SharedError, World
from plrd_train.tracking import console

Snapshot = Mapping[str, Tensor]  # parameter -> this rank's shard, in host memory; read-only


class Checkpoints:
    """A folder of checkpoints, one sub-folder each, named by the optimizer steps of the run so far and, at the end of a
    stage, by that. It is made visible by a rename when it is whole, and named in the file `latest`. The ends of stages
    stay, and so do the newest `keep`. They are written by a thread of their own, over a process group of its own, while
    training goes on."""

    def __init__(self, folder: Path, engine: Engine, keep: int):
        """A collective."""
        self._folder, self._engine, self._keep = folder, engine, keep
        self._writer = Exchange(engine.world)
        self._pending: Future[None] | None = None

    def _of(self, progress: Progress) -> Path:
        name = f"step-{progress.counters.steps:08d}"
        return self._folder / (name if progress.under_way else f"{name}-stage-{progress.stages}")

    def _all(self) -> list[Path]:
        """Newest first."""
        return sorted((path for path in self._folder.glob("step-*") if not path.name.endswith(".tmp")), reverse=True)

    # Reading

    def latest(self) -> Progress | None:
        """The progress in the newest undamaged checkpoint; None if there is no checkpoint. A collective.

        A damaged checkpoint is skipped with a warning. Raises SharedError if all are damaged.
        """
        world = self._engine.world
        if world.on_main(lambda: self._folder.exists() and not self._folder.is_dir()):
            raise SharedError(f"{self._folder}: not a folder; move it away")
        folders = world.on_main(self._all)
        for folder in folders:
            wrong = saved.damage(folder, world)
            if wrong is None:
                return world.on_main(partial(self._read, folder))
            console.say(f"warning: {wrong}: this checkpoint is damaged and passed over")
        if folders:
            raise SharedError(
                f"{self._folder}: every checkpoint here is damaged; restore one, or remove this folder to begin "
                "again (members that are there stay)"
            )
        return None

    def _read(self, folder: Path) -> Progress:
        path = folder / "progress.json"
        try:
            progress = Progress.from_json(path.read_text())
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not a checkpoint of this version ({error}); use another run_dir") from None
        if self._of(progress) != folder:
            raise UserError(f"{path}: of another checkpoint than its folder says; use another run_dir")
        self._tidy(folder)  # the run may have been stopped just before it removed old checkpoints
        return progress

    def load(self, progress: Progress, architecture: Architecture, member: bool = False) -> None:
        """Load the trunk at the end of a stage into the engine, or the member of that stage. A collective."""
        self._build(progress, architecture)
        self._engine.restore(self._shards(progress, "member" if member and progress.branched else "model"))

    def load_stage(
        self, progress: Progress, architecture: Architecture, optimizer: Optimizer
    ) -> dict[str, Tensor] | None:
        """Load an unfinished stage into the engine, with its optimizer. Returns the trunk if the stage had reached its
        branch. A collective."""
        assert progress.under_way is not None
        self._build(progress, architecture)
        self._engine.restore(self._shards(progress, "model"))
        under_way = progress.under_way
        made = under_way.steps - under_way.judged.skipped
        self._engine.start(optimizer)
        state = self._engine.state()  # zeros, overwritten below
        for part, shards in state.items():
            self._read_shards(progress, part, shards)
        self._engine.start(optimizer, made, state)
        return self._shards(progress, "trunk") if under_way.in_branch else None

    def _build(self, progress: Progress, architecture: Architecture) -> None:
        try:
            self._engine.build(architecture)
        except ValueError as error:  # on every rank alike
            raise SharedError(
                f"{self._of(progress) / 'progress.json'}: not of this parent ({error}); use another run_dir"
            ) from None

    def _shards(self, progress: Progress, part: str) -> dict[str, Tensor]:
        """This rank's shards of a part of the checkpoint, in the structure of the model in the engine. A collective."""
        shards = self._engine.snapshot()
        self._read_shards(progress, part, shards)
        return shards

    def _read_shards(self, progress: Progress, part: str, shards: Mapping[str, Tensor]) -> None:
        """Fill `shards` in place from a part of the checkpoint. A collective."""
        saved.read(
            {f"{part}/{name}": tensor for name, tensor in self._engine.sharded(shards).items()}, self._of(progress)
        )

    # Writing

    def save(self, progress: Progress, trunk: Snapshot, member: Snapshot | None = None) -> None:
        """Save the end of a stage: its trunk, and its member if there is a branch. The files are written in the
        background, after those of the save before. Raises what `wait` raises. A collective."""
        self._save(progress, {"model": trunk} if member is None else {"model": trunk, "member": member})

    def save_stage(self, progress: Progress, trunk: Snapshot | None) -> None:
        """Save an unfinished stage: the model in the engine, its optimizer, and the `trunk` if the model is a branch.
        Writes in the background, as `save` does. A collective."""
        parts = {"model": self._engine.snapshot(), **self._engine.state()}
        self._save(progress, parts if trunk is None else {**parts, "trunk": trunk})

    def _save(self, progress: Progress, parts: Mapping[str, Snapshot]) -> None:
        self.wait()
        state = {
            f"{part}/{name}": tensor
            for part, shards in parts.items()
            for name, tensor in self._engine.sharded(shards).items()
        }
        folder, text = self._of(progress), progress.to_json()  # now, since the counters go on
        self._pending = self._writer.run(lambda world: self._write(world, folder, text, state))

    def wait(self) -> None:
        """Wait until everything is saved. Raises SharedError if that failed. A collective."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, world: World, final: Path, progress: str, state: Mapping[str, Tensor]) -> None:
        temporary = final.with_name(final.name + ".tmp")
        world.on_main(lambda: self._make_empty(temporary))
        saved.write(state, temporary, world)
        world.on_main(lambda: write_atomically(temporary / "progress.json", progress))
        sums = saved.checksums(temporary, world)
        world.on_main(lambda: self._make_visible(temporary, final, saved.format_checksums(sums)))

    @staticmethod
    def _make_empty(folder: Path) -> None:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)

    def _make_visible(self, temporary: Path, final: Path, sums: str) -> None:
        write_atomically(temporary / saved.SUMS, sums)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        # `latest` is for people and their tools. A restart looks at the folders.
        write_atomically(self._folder / "latest", final.name + "\n")
        self._tidy(final)
        for folder in self._all():
            if folder > final:  # damaged: the run was resumed from an older one
                shutil.rmtree(folder, ignore_errors=True)

    def _tidy(self, newest: Path) -> None:
        """Remove all but the checkpoint `newest`, the `keep` - 1 before it, and the ends of stages."""
        older = [folder for folder in self._all() if folder < newest][self._keep - 1 :]
        for folder in [*(folder for folder in older if "-stage-" not in folder.name), *self._folder.glob("step-*.tmp")]:
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder, once its model has been published. Not a collective."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        self._writer.close()

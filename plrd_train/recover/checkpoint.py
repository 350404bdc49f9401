"""What a restart needs: the trunk in float32 after each finished stage, and how far the run was."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from plrd_train.engine import Architecture, Engine
from plrd_train.errors import UserError


@dataclass(frozen=True)
class Progress:
    """How far a run is. `tokens_total` are all tokens trained on, `tokens_lineage` those that the trunk's weights have seen; `ranks` says what the
    trunk is made of; `position` is the data loader's; `entry` is the family.json entry of the member that the last finished stage publishes."""

    stages: int = 0
    steps: int = 0
    tokens_total: int = 0
    tokens_lineage: int = 0
    ranks: dict[str, int] = field(default_factory=dict)
    domain_tokens: dict[str, int] = field(default_factory=dict)
    position: dict[str, Any] | None = None
    entry: dict[str, Any] | None = None


class Checkpoints:
    """The folder `run_dir/checkpoints`: one sub-folder a finished stage, made visible by a rename when it is whole; only the newest is kept."""

    def __init__(self, run_dir: Path, engine: Engine):
        self._folder, self._engine = run_dir / "checkpoints", engine

    def _of(self, stages: int) -> Path:
        return self._folder / f"stage-{stages}"

    def latest(self) -> Progress | None:
        """Where the run stopped; None at its start. Raises UserError where the newest checkpoint cannot be read."""
        return self._engine.world.on_main(self._latest)

    def _latest(self) -> Progress | None:
        done = sorted(int(path.name.removeprefix("stage-")) for path in self._folder.glob("stage-*") if not path.name.endswith(".tmp"))
        if not done:
            return None
        path = self._of(done[-1]) / "progress.json"
        try:
            progress = Progress(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path}: this checkpoint cannot be read ({error}); restore it, or remove its folder to begin again (members that are there stay)"
            ) from None
        self._keep_only(path.parent)  # a run may have been stopped before it removed the others
        return progress

    def _keep_only(self, kept: Path) -> None:
        for folder in self._folder.glob("stage-*"):
            if folder != kept:
                shutil.rmtree(folder, ignore_errors=True)

    def save(self, progress: Progress, member: Mapping[str, Tensor] | None = None) -> None:
        """Store the engine's model as the trunk after `progress.stages` stages; a `member` that is not the trunk (a snapshot of it) is stored
        beside it, and is what the engine holds afterwards. A collective."""
        world, final = self._engine.world, self._of(progress.stages)
        temporary = final.with_name(final.name + ".tmp")
        world.on_main(lambda: self._make_empty(temporary))
        self._engine.save(temporary / "trunk")
        if member is not None:
            self._engine.restore(member)
            self._engine.save(temporary / "member")
        world.on_main(lambda: self._make_visible(temporary, final, progress))

    @staticmethod
    def _make_empty(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def _make_visible(self, temporary: Path, final: Path, progress: Progress) -> None:
        with (temporary / "progress.json").open("w") as file:
            json.dump(dataclasses.asdict(progress), file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        self._keep_only(final)

    def load_trunk(self, progress: Progress, architecture: Architecture) -> None:
        """Put the trunk into the engine. A collective."""
        self._engine.load_saved(architecture, self._of(progress.stages) / "trunk")

    def load_member(self, progress: Progress, architecture: Architecture) -> None:
        """Put the member of the last stage into the engine, which is the trunk unless it was annealed on a branch. A collective."""
        member = self._of(progress.stages) / "member"
        self._engine.load_saved(architecture, member if member.exists() else member.with_name("trunk"))

"""Metrics by name, one row for each optimizer step: in metrics.jsonl, and in Weights & Biases, whose failure does not
end a run."""

import dataclasses
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from plrd_train.config.schema import Config
from plrd_train.errors import UserError
from plrd_train.runtime.world import World
from plrd_train.tracking import console
from plrd_train.tracking.rows import Row, append_row, read_rows, replace_rows

WandbMode = Literal["offline", "online", "disabled"]
_FINISH_TIMEOUT = 120.0  # seconds for the last uploads of an online run


class Tracker:
    """Writes `run_dir`/metrics.jsonl, `run_dir`/events.jsonl and a W&B run.

    On a run_dir that has rows already, a Tracker continues after the last one. A restart calls `rewind` with the step
    of its checkpoint. W&B is started by the first row. A W&B run that begins empty, as an offline one always does, is
    given all rows kept so far. So the newest local run has each step exactly once, and the older local ones are
    removed. An online run keeps the steps that it logged past the checkpoint, and gets them a second time. After an
    error of W&B the run prints one warning and continues without it."""

    def __init__(
        self,
        run_dir: Path,
        *,
        wandb_mode: WandbMode,
        wandb_project: str,
        wandb_name: str | None,
        config: Mapping[str, Any],
        budget_tokens: int,
    ):
        self._run_dir = run_dir
        self._metrics = run_dir / "metrics.jsonl"
        self._events = run_dir / "events.jsonl"
        self._budget_tokens = budget_tokens
        self._wandb = (
            None if wandb_mode == "disabled" else _WandbRun(run_dir, wandb_mode, wandb_project, wandb_name, config)
        )
        run_dir.mkdir(parents=True, exist_ok=True)
        rows = _rows_of_steps(self._metrics)
        self.rewind(rows[-1]["step"] + 1 if rows else 0)

    def rewind(self, step: int) -> None:
        """Drop the rows and events of step `step` and later; the next row logged is step `step`. Call it before
        anything is logged.

        Events of the step before are kept until this run repeats them, since the checkpoint may have been written
        before or after them.
        """
        kept = {
            path: [row for row in _rows_of_steps(path) if row["step"] < step] for path in (self._metrics, self._events)
        }
        for path, rows in kept.items():
            if path.is_file():
                replace_rows(path, rows)
        self._step = step
        self._tokens = kept[self._metrics][-1]["tokens/total"] if kept[self._metrics] else 0
        self._repeatable = {_identity(row) for row in kept[self._events] if row["step"] == step - 1}

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record one optimizer step; `tokens/total` must be among its metrics. Adds `step`, counted from 0 over the
        run, and `tokens/budget`."""
        row = {"tokens/budget": self._budget_tokens, **metrics, "step": self._step}
        self._send(row)
        append_row(self._metrics, row)
        self._step += 1
        self._tokens = metrics["tokens/total"]

    def log_event(self, kind: str, metrics: Mapping[str, float | str]) -> None:
        """Record an event between steps, such as a factoring or an evaluation. It is identified by all values that are
        no floats (a layer, a stage).

        Adds `kind`, `step` (the last finished one, -1 before the first) and, if not given, `tokens/total`. An event
        that repeats one from before a restart replaces it.
        """
        row: Row = {"tokens/total": self._tokens, **metrics, "kind": kind, "step": self._step - 1}
        self._send(row)
        identity = _identity(row)
        if identity in self._repeatable:
            self._repeatable.remove(identity)
            replace_rows(self._events, [old for old in read_rows(self._events) if _identity(old) != identity])
        append_row(self._events, row)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Give W&B the outcome of the run by name."""
        if self._wandb:
            self._wandb.summary(values)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run; 0 marks it finished, anything else failed."""
        if self._wandb:
            self._wandb.finish(exit_code)

    def _send(self, row: Row) -> None:
        """Log `row` to W&B. This comes before the row is in its file: a W&B run that starts now gets all rows of the
        files first."""
        if self._wandb:
            self._wandb.log(
                row,
                earlier=lambda: sorted(read_rows(self._metrics) + read_rows(self._events), key=lambda row: row["step"]),
            )


class NullTracker(Tracker):
    """The tracker of every rank but 0. It records nothing."""

    def __init__(self) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def log(self, metrics: Mapping[str, float]) -> None:
        pass

    def log_event(self, kind: str, metrics: Mapping[str, float | str]) -> None:
        pass

    def summary(self, values: Mapping[str, Any]) -> None:
        pass

    def close(self, exit_code: int = 0) -> None:
        pass


def open_tracker(config: Config, world: World, run_dir: Path, budget_tokens: int) -> Tracker:
    """The tracker of this rank for `run_dir`, by the keys `tracking.*`."""
    if not world.is_main:
        return NullTracker()
    wandb = config.tracking.wandb
    return Tracker(
        run_dir,
        wandb_mode=wandb.mode,
        wandb_project=wandb.project,
        wandb_name=wandb.name or run_dir.absolute().name,
        config=dataclasses.asdict(config),
        budget_tokens=budget_tokens,
    )


def _rows_of_steps(path: Path) -> list[Row]:
    """The rows of `path`. Raises UserError where one is not what a Tracker writes."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a file; move it away, or choose another run_dir")
    rows = read_rows(path)
    for row in rows:
        if type(row.get("step")) is not int or not isinstance(
            row.get("tokens/total", 0 if path.name == "events.jsonl" else None), (int, float)
        ):
            raise UserError(
                f"{path}: a row is no record of a step ({str(row)[:100]}); remove it, or choose another run_dir"
            )
    return rows


def _identity(event: Row) -> tuple:
    return tuple(
        sorted(
            (name, value) for name, value in event.items() if name != "tokens/total" and isinstance(value, (str, int))
        )
    )


class _WandbRun:
    """One W&B run, started at the first row. It never raises: the first failure prints a warning and turns it off."""

    def __init__(self, run_dir: Path, mode: WandbMode, project: str, name: str | None, config: Mapping[str, Any]):
        self._run_dir = run_dir
        self._mode, self._project, self._name, self._config = mode, project, name, dict(config)
        self._run: Any = None
        self._failed = False

    def log(self, row: Row, earlier: Callable[[], list[Row]]) -> None:
        """Log `row`; a run that begins empty gets the rows of `earlier` first."""
        self._guard(lambda: self._log(row, earlier))

    def summary(self, values: Mapping[str, Any]) -> None:
        if self._run:
            self._guard(lambda: self._run.summary.update(dict(values)))

    def finish(self, exit_code: int) -> None:
        if not self._run:
            return
        run, self._run = self._run, None
        self._guard(lambda: run.finish(exit_code=exit_code))
        if self._mode == "offline" and not self._failed:
            console.say(f"W&B kept this run on disk; to send it: wandb sync {run.settings.sync_dir}")

    def _guard(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # whatever it is, tracking must not take the run down
            self._failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            console.say(f"warning: W&B is off for the rest of this run ({reason}); metrics.jsonl goes on")

    def _log(self, row: Row, earlier: Callable[[], list[Row]]) -> None:
        if self._run is None:
            self._run = self._start()
            # What a resumed online run has; an offline one has nothing.
            known = self._run.summary.get("step", -math.inf)
            for old in earlier():
                if old["step"] > known:
                    self._run.log(old)
            self._remove_older()
        self._run.log(row)

    def _start(self) -> Any:
        mode = self._mode
        os.environ["WANDB_MODE"] = mode  # `tracking.wandb.mode` decides, not what the environment says
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # W&B's own crash reports look up a host even when offline
        folder = self._run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        os.environ.setdefault("WANDB_CACHE_DIR", str((folder / "cache").absolute()))
        import wandb  # here, because it takes a second or two and reads the environment

        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key: set WANDB_API_KEY or run wandb login")
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # command line, user and host names
            x_disable_machine_info=True,
            x_disable_stats=mode == "offline",  # they ask the network which cloud this is
            x_save_requirements=False,
            x_transaction_log_flush_interval=1.0,  # seconds of log that a kill may lose
            finish_timeout=_FINISH_TIMEOUT,
        )
        run = wandb.init(
            dir=self._run_dir,
            id=self._run_id(),
            resume="allow",
            mode=mode,
            project=self._project,
            name=self._name,
            config=self._config,
            settings=settings,
        )
        run.define_metric("tokens/total")
        run.define_metric("*", step_metric="tokens/total")
        if mode == "online":
            console.say(f"W&B: {run.url}")
        return run

    def _run_id(self) -> str:
        """The id of this run_dir's W&B run, made at the first start."""
        path = self._run_dir / "wandb_run_id"
        if not path.is_file():
            path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    def _remove_older(self) -> None:
        """Remove the local logs of offline runs that the present one repeats from the beginning."""
        current = Path(self._run.settings.sync_dir).name
        for folder in (self._run_dir / "wandb").glob(f"offline-run-*-{self._run.id}*"):
            if folder.name != current:
                shutil.rmtree(folder, ignore_errors=True)

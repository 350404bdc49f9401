"""metrics.jsonl and W&B hold each optimizer step once, whatever happens to the process or to W&B."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tracking import wandb_log

from plrd_train.config.compose import compose
from plrd_train.config.schema import from_mapping
from plrd_train.runtime.world import World
from plrd_train.tracking.tracker import Tracker, open_tracker

ROOT = Path(__file__).resolve().parents[2]


def tracker(run_dir: Path, mode: str = "disabled") -> Tracker:
    return Tracker(
        run_dir, wandb_mode=mode, wandb_project="plrd-tests", wandb_name="a run", config={"seed": 0}, budget_tokens=1000
    )


def metrics(step: int) -> dict[str, float]:
    return {
        "train/loss": 3.0 - step / 8,
        "train/lr": 1e-3,
        "tokens/total": 100 * (step + 1),
        "data/PythonDocs_tokens": 60 * (step + 1),
    }


def rows(path: Path) -> list[dict]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code`, with the names of this file, in a process of its own."""
    # Not this process's W&B service.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env = {**inherited, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment}
    return subprocess.run(
        [sys.executable, "-c", f"from tracking.test_tracker import *\n{code}"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_each_step_is_one_row_under_the_same_names(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", "online")  # our key decides, not the environment
    it = tracker(tmp_path, mode)
    for step in range(5):
        it.log(metrics(step))
    it.close()
    kept = rows(tmp_path / "metrics.jsonl")
    assert kept == [{"tokens/budget": 1000, **metrics(step), "step": step} for step in range(5)]
    if mode == "disabled":
        assert not (tmp_path / "wandb").exists()
        return
    (log,) = wandb_log.runs(tmp_path)
    assert wandb_log.history(log) == kept
    axes = {
        record.metric.glob_name: record.metric.step_metric
        for record in wandb_log.finished(log)
        if record.HasField("metric")
    }
    assert axes["*"] == "tokens/total"


def test_a_killed_run_goes_on_as_the_same_wandb_run_with_each_step_once(tmp_path):
    killed = in_a_process(
        f"it = tracker(Path({str(tmp_path)!r}), 'offline')\n"
        "it.log_event('evaluation', {'val/loss': 2.5, 'stage/index': 0})\n"
        "for step in range(6): it.log(metrics(step))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (first,) = wandb_log.runs(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/loss": 2.2, "st')

    it = tracker(tmp_path, "offline")
    it.rewind(4)
    for step in range(4, 8):
        it.log({**metrics(step), "train/loss": 1.0})
    it.close()

    kept = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in kept] == list(range(8))
    assert [row["train/loss"] == 1.0 for row in kept] == [False] * 4 + [True] * 4
    (second,) = wandb_log.runs(tmp_path)
    assert second.name == first.name  # run-ID.wandb
    *_, event = rows(tmp_path / "events.jsonl")
    assert wandb_log.history(second) == [event, *kept]


def test_a_tracker_on_older_rows_goes_on_after_the_last_whole_one(tmp_path):
    it = tracker(tmp_path)
    it.log(metrics(0))
    it.log(metrics(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    tracker(tmp_path).log(metrics(2))
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_rewinding_to_the_beginning_leaves_nothing(tmp_path):
    it = tracker(tmp_path)
    it.log(metrics(0))
    it.rewind(0)
    it.log(metrics(0))
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0]


def test_what_is_no_number_stays_json(tmp_path):
    it = tracker(tmp_path)
    it.log({**metrics(0), "train/loss": math.nan, "train/grad_norm": math.inf})
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row["train/loss"] is None and row["train/grad_norm"] is None and row["train/lr"] == 1e-3


def test_an_event_repeated_after_a_restart_replaces_the_one_before(tmp_path):
    def factor(it: Tracker, stage: int, error: float) -> None:
        for linear in ("q", "k"):
            it.log_event("factor", {"linear": linear, "stage/index": stage, "factor/rel_error": error})

    it = tracker(tmp_path)
    factor(it, 1, 0.1)
    it.log(metrics(0))
    it.log_event("evaluation", {"when": "after recovery", "stage/index": 1, "val/loss": 2.0})
    factor(it, 2, 0.2)  # the checkpoint of step 1 was written before this, and the restart repeats it
    it.log(metrics(1))
    it.log_event("evaluation", {"when": "after recovery", "stage/index": 2, "val/loss": 2.5})

    again = tracker(tmp_path)
    again.rewind(1)
    factor(again, 2, 0.3)
    factor(again, 2, 0.4)  # nothing of before a restart: another event
    kept = [
        (row["step"], row["kind"], row.get("linear"), row.get("factor/rel_error"))
        for row in rows(tmp_path / "events.jsonl")
    ]
    first = [(-1, "factor", "q", 0.1), (-1, "factor", "k", 0.1), (0, "evaluation", None, None)]
    assert kept == first + [(0, "factor", linear, error) for error in (0.3, 0.4) for linear in ("q", "k")]
    assert rows(tmp_path / "events.jsonl")[-1]["tokens/total"] == 100


def test_where_wandb_cannot_write_one_line_says_so(tmp_path, capsys):
    (tmp_path / "wandb").write_text("a file stands in the way")
    it = tracker(tmp_path, "offline")
    for step in range(3):
        it.log(metrics(step))
    it.summary({"ppl": 3.0})
    it.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert capsys.readouterr().out.count("warning: W&B is off") == 1


@pytest.mark.parametrize("key", ["", "0123456789" * 4])
def test_online_without_a_key_or_a_network_costs_one_line(tmp_path, key):
    done = in_a_process(
        f"it = tracker(Path({str(tmp_path)!r}), 'online')\nfor step in range(3): it.log(metrics(step))\nit.close()",
        HOME=str(tmp_path / "home"),
        WANDB_API_KEY=key,
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_INIT_TIMEOUT="1",
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("warning: W&B is off") and "0123456789" not in done.stdout
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_keeps_anything(tmp_path, rank):
    (source,) = compose(["experiment=quickstart", "tracking.wandb.mode=disabled"])
    run_dir = tmp_path / "run"
    it = open_tracker(from_mapping(source), World(rank, 2, torch.device("cpu")), run_dir, 700)
    it.rewind(0)
    it.log(metrics(0))
    it.log_event("factor", {"factor/seconds": 1.0})
    it.summary({"ppl": 3.0})
    it.close()
    assert sorted(path.name for path in tmp_path.rglob("*.jsonl")) == (
        ["events.jsonl", "metrics.jsonl"] if rank == 0 else []
    )
    assert rank or rows(run_dir / "metrics.jsonl")[0]["tokens/budget"] == 700

"""A run that is asked to stop saves where it is, says so once, ends with status 75, and ends as if nothing had happened
when it goes on."""

import signal

import pytest
from faults import kill_before, signal_before, touch_before
from processes import run_job
from test_restart import SHORT, STEPS, records, same_members

LOG, STEP, EVALUATE = (
    "plrd_train.tracking.tracker:Tracker.log",
    "plrd_train.recover.loop:Trainer._step",
    "plrd_train.stages.evaluate:_perplexity",
)
BRANCH = "schedule.branch=0.67"  # four steps of the six
SLOW = [
    pytest.param(engine, overrides, marks=pytest.mark.slow)
    for engine, overrides in (("zero3", ["engine.dtype=bf16"]), ("fsdp", []))
]


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """undisturbed(ranks, *overrides) -> the run_dir of such a run, never stopped; made once."""
    made = {}

    def make(ranks: int, *overrides: str):
        if (ranks, overrides) not in made:
            run_dir = made[ranks, overrides] = tmp_path_factory.mktemp("undisturbed") / "run"
            ended = run_job(ranks, command(run_dir, SHORT, *overrides))
            assert (ended.status, ended.err) == (0, "")
        return made[ranks, overrides]

    return make


def stopped(ranks: int, arguments: list[str], *fault) -> str:
    """What is said last by a run that `fault` asks to stop."""
    ended = run_job(ranks, arguments, *fault)
    assert (ended.status, ended.err) == (75, "")
    (line,) = [line for line in ended.out.splitlines() if "stopped" in line]
    assert line == ended.out.splitlines()[-1] and line.endswith("the same command goes on from there")
    return line


def goes_on(ranks: int, arguments: list[str], steps: int) -> None:
    """Finish in exactly `steps` more optimizer steps: rank 0 would not survive one more."""
    ended = run_job(ranks, arguments, kill_before, STEP, steps)
    assert (ended.status, ended.err) == (0, "")


def steps_done(run_dir) -> int:
    return len((run_dir / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(("engine", "overrides"), [("fsdp", [BRANCH]), ("zero3", []), *SLOW], ids=str)
def test_by_the_file_in_run_dir(command, undisturbed, tmp_path, engine, overrides):
    run_dir, overrides = tmp_path / "run", [f"engine={engine}", *overrides]
    arguments = command(run_dir, SHORT, "engine.dtype=fp32", *overrides)
    line = stopped(2, arguments, touch_before, LOG, STEPS, run_dir / "stop")
    assert not (run_dir / "stop").exists()
    done = steps_done(run_dir)
    assert STEPS + 2 <= done < 2 * STEPS and f"after {done - STEPS} steps of this stage" in line
    assert f"step-{done:08d}" in {path.name for path in (run_dir / "checkpoints").iterdir()}
    goes_on(2, arguments, 2 * STEPS - done)
    expected = undisturbed(2, "engine.dtype=fp32", *overrides)
    assert same_members(run_dir, expected) and records(run_dir) == records(expected)


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGINT), (signal.SIGUSR1, signal.SIGHUP)],
    ids=lambda number: number.name,
)
def test_by_a_signal_to_any_rank(command, undisturbed, tmp_path, first, second):
    """In the middle of the first stage, and again in that of the second."""
    run_dir, done = tmp_path / "run", 0
    for stage, number in enumerate((first, second)):
        stopped(2, command(run_dir, SHORT), signal_before, STEP, stage * STEPS + STEPS // 2 - done, number, 1)
        done = steps_done(run_dir)
        assert stage * STEPS + STEPS // 2 + 1 <= done < (stage + 1) * STEPS
    goes_on(2, command(run_dir, SHORT), 2 * STEPS - done)
    assert same_members(run_dir, undisturbed(2)) and records(run_dir) == records(undisturbed(2))


def test_what_was_stopped_goes_on_on_another_number_of_ranks(command, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    stopped(2, command(run_dir, SHORT), signal_before, STEP, STEPS + 1, signal.SIGTERM)
    goes_on(3, command(run_dir, SHORT), 2 * STEPS - steps_done(run_dir))
    (_, found, _), (_, wanted, _) = records(run_dir), records(undisturbed(2))
    assert [row["train/loss"] for row in found] == pytest.approx([row["train/loss"] for row in wanted], abs=1e-4)


def test_before_a_member_is_published(command, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    line = stopped(1, command(run_dir, SHORT, BRANCH), signal_before, STEP, STEPS - 1, signal.SIGTERM)
    assert "before member 1.25x is published" in line and not list((run_dir / "members").glob("*"))
    goes_on(1, command(run_dir, SHORT, BRANCH), STEPS)
    expected = undisturbed(1, BRANCH)
    assert same_members(run_dir, expected) and records(run_dir) == records(expected)


def test_a_request_during_an_evaluation_is_met_before_the_next_stage(command, tmp_path):
    run_dir = tmp_path / "run"
    assert "before stage 2" in stopped(1, command(run_dir, SHORT), signal_before, EVALUATE, 2, signal.SIGTERM)
    assert {path.name for path in (run_dir / "members").iterdir()} == {"1.25x"}
    goes_on(1, command(run_dir, SHORT), STEPS)


def twice(rank: int, where: str, call: int) -> None:
    signal_before(rank, where, call, signal.SIGINT)
    signal_before(rank, where, call, signal.SIGINT)


def test_a_second_interrupt_ends_the_process_at_once(command, tmp_path):
    ended = run_job(1, command(tmp_path / "run", SHORT), twice, STEP, 2)
    assert (ended.status, ended.err) == (130, "") and "stopped" not in ended.out


def test_a_file_that_is_there_at_the_start_was_meant_for_an_earlier_run(command, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "stop").touch()
    assert run_job(1, command(run_dir, SHORT, "stages.ratios=[1.25]")).status == 0


def test_a_parent_that_is_trained_from_scratch(command, tmp_path):
    scratch = [
        "parent=scratch",
        "parent.scratch.tokens=768",
        "parent.scratch.vocab_size=272",
        "parent.scratch.architecture={model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: "
        "2, num_attention_heads: 4}",
        "stages.ratios=[1.25]",
        SHORT,
    ]
    arguments = {
        name: [key for key in command(tmp_path / name, *scratch) if not key.startswith("parent.path")]
        for name in ("one", "two")
    }
    assert run_job(2, arguments["one"]).status == 0
    stopped(2, arguments["two"], signal_before, STEP, 2, signal.SIGTERM)
    assert not (tmp_path / "two" / "parent").exists()
    done = steps_done(tmp_path / "two" / "scratch")
    assert 3 <= done < 6
    goes_on(2, arguments["two"], 6 - done + STEPS)
    for file in (tmp_path / "one" / "parent").glob("*.safetensors"):
        assert (tmp_path / "two" / "parent" / file.name).read_bytes() == file.read_bytes()
    assert same_members(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "two" / "scratch" / "checkpoints").exists()


def test_a_killed_run_goes_on_from_its_last_checkpoint_in_mid_stage(command, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    often = command(run_dir, SHORT, "checkpoint.tokens=128")
    assert run_job(2, often, kill_before, "plrd_train.recover.checkpoint:Checkpoints._make_visible", 2).status == -9
    newest = max(int(path.name.split("-")[1]) for path in (run_dir / "checkpoints").glob("step-*[0-9]"))
    assert newest > 0 and newest % STEPS
    goes_on(2, often, 2 * STEPS - newest)
    assert same_members(run_dir, undisturbed(2)) and records(run_dir) == records(undisturbed(2))

"""launch/slurm on a real Slurm of two nodes (slurm_lab.py)."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from slurm_lab import Cluster, cluster

ROOT = Path(__file__).resolve().parents[2]
LONG = "stages.tokens=19200"  # two stages of 150 steps, so that there is time to disturb them
PATIENCE_S = 300
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with TemporaryDirectory() as folder, cluster(Path(folder)) as running:
        running.environment |= {"OMP_NUM_THREADS": "1", "NPROC": "1"}
        yield running


def submit(slurm: Cluster, script: str, *arguments: object, options: tuple[str, ...] = ()) -> str:
    """The number of the job."""
    place = ("--parsable", f"--chdir={ROOT}", f"--output={slurm.folder}/job-%j.out")
    return slurm.run("sbatch", *place, *options, f"launch/slurm/{script}.sbatch", *map(str, arguments)).strip()


def until(slurm: Cluster, job: str, run_dir: Path, condition: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    """What Slurm says of the job when `condition` holds for that."""
    end = time.monotonic() + PATIENCE_S
    while not condition(known := slurm.job(job)):
        unforeseen = known["JobState"] in ENDED or time.monotonic() > end
        assert not unforeseen, f"{known}\n{slurm.logs()}\n{logs(slurm, run_dir)}"
        time.sleep(0.2)
    return known


def logs(slurm: Cluster, run_dir: Path) -> str:
    files = [*slurm.folder.glob("job-*.out"), *run_dir.glob("slurm/*/*.log")]
    return "\n".join(f"--- {file}\n{file.read_text()[-4000:]}" for file in files)


def ended(slurm: Cluster, job: str, run_dir: Path, state: str = "COMPLETED") -> dict[str, str]:
    return until(slurm, job, run_dir, lambda known: known["JobState"] == state)


def in_training(slurm: Cluster, job: str, run_dir: Path, steps: int) -> None:
    """Wait until the job has made that many steps."""
    until(slurm, job, run_dir, lambda known: len(losses(run_dir)) >= steps)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    file = run_dir / "metrics.jsonl"
    rows = (
        [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if file.exists()
        else []
    )
    return [(row["step"], row["train/loss"]) for row in rows]


def members(run_dir: Path) -> dict[str, bytes]:
    found = {path.parent.name: path.read_bytes() for path in run_dir.glob("members/*/*.safetensors")}
    assert set(found) == {"1.25x", "1.6x"}
    return found


@pytest.fixture(scope="module")
def undisturbed(slurm, command, tmp_path_factory) -> tuple[Path, str, str]:
    """The run_dir of a family that was made on two nodes, its job, and the job of its evaluation."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    job = submit(slurm, "family", *command(run_dir, LONG), options=("--nodes=2",))
    depends = (f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    evaluation = submit(slurm, "evaluate", run_dir, "--tokens", 500, options=depends)
    ended(slurm, job, run_dir)
    return run_dir, job, evaluation


def test_two_nodes_make_a_family(undisturbed):
    run_dir, job, _ = undisturbed
    assert members(run_dir)
    assert [member["world_size"] for member in json.loads((run_dir / "family.json").read_text())["members"]] == [2, 2]
    folder = run_dir / "slurm" / job
    assert {path.name for path in folder.iterdir()} >= {"batch.log", "node1.log", "node2.log"}
    assert "family.png" in (folder / "node1.log").read_text() and "status 0" in (folder / "batch.log").read_text()
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["recover"]["lr"] == 4e-3
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert (folder / "commit").read_text() == head and (folder / "uncommitted.diff").exists()


def test_the_family_is_evaluated_when_it_is_finished(slurm, undisturbed):
    run_dir, job, evaluation = undisturbed
    assert ended(slurm, evaluation, run_dir)["StartTime"] >= slurm.job(job)["EndTime"]
    found = json.loads((run_dir / "slurm" / evaluation / "evaluation.json").read_text())
    assert found["members"].keys() == {"1.25x", "1.6x"}
    assert all(
        0 < result["nll_tokens"] <= 500 and result["ppl"] > 1
        for result in (found["parent"], *found["members"].values())
    )


def test_a_job_that_is_signalled_before_its_limit_is_requeued_and_ends_as_if_nothing_had_happened(
    slurm, undisturbed, command, tmp_path
):
    run_dir = tmp_path / "run"
    job = submit(slurm, "family", *command(run_dir, LONG), options=("--nodes=2",))
    in_training(slurm, job, run_dir, 5)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert ended(slurm, job, run_dir)["Restarts"] == "1"
    said = (run_dir / "slurm" / job / "node1.log").read_text()
    assert said.count("stopped as asked, after ") == 1 and said.count("perplexity of the parent") == 1
    assert (members(run_dir), losses(run_dir)) == (members(undisturbed[0]), losses(undisturbed[0]))


def test_a_job_that_is_told_to_end_saves_and_stays_away(slurm, command, tmp_path):
    run_dir = tmp_path / "run"
    job = submit(slurm, "family", *command(run_dir, LONG), options=("--nodes=1",))
    in_training(slurm, job, run_dir, 5)
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    known = ended(slurm, job, run_dir, "FAILED")
    assert (known["ExitCode"], known["Restarts"]) == ("75:0", "0")
    assert (run_dir / "checkpoints" / f"step-{len(losses(run_dir)):08d}").is_dir()


def test_a_job_that_loses_a_node_comes_back(slurm, undisturbed, command, tmp_path):
    run_dir = tmp_path / "run"
    job = submit(slurm, "family", *command(run_dir, LONG, "checkpoint.tokens=1280"), options=("--nodes=2",))
    in_training(slurm, job, run_dir, 30)
    slurm.cut("node2")
    until(slurm, job, run_dir, lambda known: known["Restarts"] == "1")
    assert "status 1, a node is lost" in (run_dir / "slurm" / job / "batch.log").read_text()
    slurm.write_off("node2")
    slurm.repair("node2")
    ended(slurm, job, run_dir)
    assert (members(run_dir), losses(run_dir)) == (members(undisturbed[0]), losses(undisturbed[0]))


def test_an_array_makes_a_family_of_each_point_on_the_gpus_that_it_is_given(slurm, command, tmp_path):
    arguments = command(tmp_path / "seed-${seed}", "stages.ratios=[1.25]", "seed=3,4")
    slurm.environment.pop("NPROC")
    try:
        array = submit(slurm, "array", *arguments, options=("--array=0-1", "--nodes=1", "--gpus-per-node=2"))
    finally:
        slurm.environment["NPROC"] = "1"
    made = []
    for index, seed in enumerate((3, 4)):
        run_dir = tmp_path / f"seed-{seed}"
        ended(slurm, f"{array}_{index}", run_dir)
        assert yaml.safe_load((run_dir / "config.yaml").read_text())["seed"] == seed
        (member,) = json.loads((run_dir / "family.json").read_text())["members"]
        assert member["world_size"] == 2
        made.append((run_dir / "members" / "1.25x" / "model.plrd.safetensors").read_bytes())
    assert made[0] != made[1]


def test_a_mistake_ends_the_job_and_what_depends_on_it(slurm, tmp_path):
    job = submit(slurm, "family", "experiment=quickstrt", options=("--nodes=2",))
    depends = (f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    evaluation = submit(slurm, "evaluate", tmp_path, options=depends)
    assert ended(slurm, job, tmp_path, "FAILED")["ExitCode"] == "2:0"
    said = (slurm.folder / f"job-{job}.out").read_text()
    assert "Could not find 'experiment/quickstrt'" in said and len(said.splitlines()) == 1
    ended(slurm, evaluation, tmp_path, "CANCELLED")

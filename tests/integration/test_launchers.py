"""launch/*.sh on one machine: what they hand on, and what comes back. Several hosts:
tests/cluster/test_two_hosts.py."""

import json
import shutil
import signal
import socket
import subprocess

import pytest
from launching import LAUNCH, launched
from processes import run_job
from test_restart import SHORT, same_members

AWKWARD = ["run_dir=a b/$HOME's *", "data.train='x, y'", 'parent.scratch.architecture={model_type: "llama"}', ""]
REPORT = """#!/bin/sh
# What the launcher runs, as one object of JSON; of the snippets that ask for a free port, a port.
[ "$1" = -c ] && echo 4711 && exit
python3 -c 'import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "threads": os.environ["OMP_NUM_THREADS"]}))' "$@"
"""
SMI = """#!/bin/sh
for i in $(seq $GPUS); do
    echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"
    echo "  MIG 1g.10gb Device 0: (UUID: MIG-$i)"
done
"""


@pytest.fixture
def told(tmp_path):
    """told(script, *arguments, **environment) -> what the script runs as `python`: its arguments, and OMP_NUM_THREADS.
    The machine has 16 cores."""
    launch, commands = tmp_path / "checkout" / "launch", tmp_path / "bin"
    shutil.copytree(LAUNCH, launch)
    commands.mkdir()
    for name, text in (("python", REPORT), ("nproc", "#!/bin/sh\necho 16\n"), ("nvidia-smi", SMI)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)

    def tell(script, *arguments, **environment) -> dict:
        wanted = {"PATH": f"{commands}:/usr/bin:/bin", "GPUS": "0", **environment}
        done = subprocess.run([launch / script, *arguments], env=wanted, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return tell


def value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


SCRIPTS = {"local.sh": {}, "torchrun.sh": {"NNODES": "4", "RDZV": "host0:29500"}, "deepspeed.sh": {}}
RANKS = {"local.sh": "--nproc_per_node", "torchrun.sh": "--nproc_per_node", "deepspeed.sh": "--num_gpus"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_overrides_arrive_as_they_were_given(told, script):
    arguments = told(script, *AWKWARD, **SCRIPTS[script])["arguments"]
    assert arguments[-len(AWKWARD) :] == AWKWARD and arguments[-len(AWKWARD) - 1] == "plrd_train"


MACHINES = [
    ({}, "2", "8"),
    ({"NPROC": "3"}, "3", "5"),
    ({"NPROC": "32"}, "32", "1"),
    ({"GPUS": "8"}, "8", "2"),
    ({"GPUS": "8", "NPROC": "4"}, "4", "4"),
    ({"GPUS": "8", "OMP_NUM_THREADS": "7"}, "8", "7"),
    ({"GPUS": "8", "CUDA_VISIBLE_DEVICES": ""}, "2", "8"),
    ({"GPUS": "8", "CUDA_VISIBLE_DEVICES": "-1"}, "2", "8"),
    ({"GPUS": "8", "CUDA_VISIBLE_DEVICES": "2,3,5,7"}, "4", "4"),
    ({"GPUS": "8", "CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1"}, "2", "8"),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("machine", "ranks", "threads"), MACHINES, ids=str)
def test_ranks_times_threads_are_the_cores(told, script, machine, ranks, threads):
    ran = told(script, "x=1", **SCRIPTS[script], **machine)
    assert ran["threads"] == threads
    if script == "deepspeed.sh" and machine.get("CUDA_VISIBLE_DEVICES"):
        assert RANKS[script] not in ran["arguments"]  # it would take the first GPUs, and not those that are visible
    else:
        assert value(ran["arguments"], RANKS[script]) == ranks


def test_deepspeed_without_ssh_takes_its_line_of_the_hostfile(told, tmp_path):
    (tmp_path / "hosts").write_text("# ours\nalpha slots=8\n\nbeta slots=4\n")
    ran = told("deepspeed.sh", "x=1", HOSTFILE=str(tmp_path / "hosts"), NODE_RANK="1")
    assert ran["threads"] == "4" and "--no_ssh" in ran["arguments"]
    found = [value(ran["arguments"], flag) for flag in ("--hostfile", "--node_rank", "--master_addr", "--master_port")]
    assert found == [str(tmp_path / "hosts"), "1", "alpha", "29500"]
    with_ssh = told(
        "deepspeed.sh", "x=1", HOSTFILE=str(tmp_path / "hosts"), MASTER="10.0.0.1", PORT="5", OMP_NUM_THREADS="1"
    )["arguments"]
    assert "--no_ssh" not in with_ssh and [value(with_ssh, flag) for flag in ("--master_addr", "--master_port")] == [
        "10.0.0.1",
        "5",
    ]


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("torchrun.sh", {"RDZV": "host0"}, "NNODES: how many machines"),
        ("torchrun.sh", {"NNODES": 2}, "RDZV: host or host:port"),
        ("deepspeed.sh", {"HOSTFILE": "hosts", "NODE_RANK": 2}, "NODE_RANK=2: hosts has no such line"),
        ("deepspeed.sh", {"HOSTFILE": "nowhere", "NODE_RANK": 0}, "nowhere"),
    ],
)
def test_what_a_launcher_lacks_is_named(tmp_path, monkeypatch, script, environment, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("alpha slots=8\nbeta slots=8\n")
    with launched([LAUNCH / script, "x=1"], **environment) as launcher:
        assert launcher.status() != 0 and message in launcher.err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_torchrun_on_one_node(command, tmp_path):
    with launched(
        [LAUNCH / "torchrun.sh", *command(tmp_path / "ein kürzerer Lauf", SHORT)],
        NNODES=1,
        NPROC=2,
        RDZV=f"{socket.gethostname()}:{free_port()}",
    ) as run:
        assert run.status() == 0, run.err
    assert run_job(2, command(tmp_path / "expected", SHORT)).status == 0
    assert same_members(tmp_path / "ein kürzerer Lauf", tmp_path / "expected")


def test_hosts_that_do_not_meet():
    with launched(
        [LAUNCH / "torchrun.sh", "x=1"], NNODES=2, NPROC=1, RDZV="nowhere.invalid", PET_RDZV_CONF="read_timeout=1"
    ) as run:
        assert run.status() == 2
        (line,) = [line for line in run.err.splitlines() if line.startswith("error: ")]
        assert "2 hosts do not meet at nowhere.invalid" in line and "Traceback" not in run.err


def test_a_mistake_comes_back_as_its_line_and_status(command, tmp_path):
    # The launcher sets its own.
    left_over = {"RANK": "7", "WORLD_SIZE": "", "LOCAL_RANK": "x", "MASTER_ADDR": "nowhere.invalid"}
    with launched(
        [LAUNCH / "local.sh", *command(tmp_path / "run", "data.train=/no/where")], NPROC=1, **left_over
    ) as run:
        assert run.status() == 2
        (line,) = run.err.splitlines()
        assert line.startswith("error: ") and "/no/where" in line


def test_deepspeed_is_asked_to_stop_through_its_script(command, tmp_path):
    run_dir = tmp_path / "run"
    with launched(
        [LAUNCH / "deepspeed.sh", *command(run_dir, "engine=zero3")], NPROC=2, RANK="7", WORLD_SIZE="9"
    ) as run:
        run.wait_until(
            lambda: (
                (run_dir / "metrics.jsonl").exists() and len((run_dir / "metrics.jsonl").read_text().splitlines()) > 2
            )
        )
        run.process.send_signal(signal.SIGUSR1)
        assert run.status() == 75, run.err
        assert run.out.count("the same command goes on from there") == 1
    assert list((run_dir / "checkpoints").glob("step-*"))

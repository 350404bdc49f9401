"""Slurm on one machine: Debian's munged, slurmctld and a slurmd for each node, which a test can cut from power.

The cluster lives in process, network and mount namespaces of its own, and each node in its own inside these, with its
host name, address, /proc and /dev/shm. The first process of a namespace takes everything in it along when it is killed:
that is how a node loses its power, and how the cluster ends, even where pytest is killed. There is no systemd, no
cgroup and no database: memory and CPUs are not limited, and `sacct` knows nothing.
"""

import contextlib
import ctypes
import os
import re
import secrets
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from debian import require_debian

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "iproute2", "util-linux")
NETWORK = "10.88.0"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_REAP = "while :; do sleep 3600 & wait $!; done"  # the first process of a namespace inherits its orphans

CREDENTIAL_S = 5  # a job that is requeued waits until its old credential has expired

# What is fast here, and otherwise as small as it gets.
CONFIG = """\
ClusterName=lab
SlurmctldHost={host}({network}.254)
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire={credential}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=3,bf_interval=3
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class Namespaces:
    """Processes that are apart from the rest of the machine, in network, process, mount and host name."""

    def __init__(self, setup: str, inside: "Namespaces | None" = None, log: Path = Path("/dev/null")):
        """`setup` is run by a shell in them first."""
        command = [
            "unshare",
            "--net",
            "--pid",
            "--mount",
            "--uts",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-ec",
        ]
        before = inside.enter() if inside else []
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*before, *command, f"{setup}\necho ready\n{_REAP}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                preexec_fn=_die_with_parent,
            )
        assert self._process.stdout is not None
        with self._process.stdout as output:
            assert output.readline() == b"ready\n", f"{command} failed: {log.read_text()}"
        first = psutil.Process(self._process.pid)
        for _ in range(2 if inside else 1):  # unshare forks, and nsenter before it
            (first,) = first.children()
        self.pid = first.pid

    def enter(self) -> list[str]:
        """The command before a command that is to run in here."""
        return ["nsenter", f"--target={self.pid}", "--net", "--pid", "--mount", "--uts", f"--wd={os.getcwd()}"]

    def run(self, *command: str) -> None:
        subprocess.run([*self.enter(), *command], check=True, stdin=subprocess.DEVNULL)

    def kill(self) -> None:
        """All processes in here, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Cluster:
    """A running Slurm. Files of its daemons lie in `folder`."""

    def __init__(self, folder: Path, nodes: Sequence[str], gpus: int):
        self.folder, self.nodes, self._boots = folder, list(nodes), 0
        self._daemons: list[subprocess.Popen] = []
        self._powered: dict[str, Namespaces] = {}
        addresses = {node: f"{NETWORK}.{i + 1}" for i, node in enumerate(nodes)}
        (folder / "state").mkdir(parents=True)
        folder.chmod(0o755)  # munge insists
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        lines = [
            f"NodeName={node} NodeAddr={address} CPUs=4 Gres=gpu:{gpus} State=UNKNOWN"
            for node, address in addresses.items()
        ]
        host = socket.gethostname().partition(".")[0]
        (folder / "slurm.conf").write_text(
            CONFIG.format(folder=folder, host=host, network=NETWORK, credential=CREDENTIAL_S, nodes="\n".join(lines))
        )
        devices = [folder / f"gpu{i}" for i in range(gpus)]
        for device in devices:  # slurmd looks for a device of each; these are /dev/null, and compute nothing
            os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (folder / "gres.conf").write_text(
            "".join(f"NodeName={','.join(nodes)} Name=gpu File={device}\n" for device in devices)
        )
        (folder / "hosts").write_text(
            "".join(f"{address} {node}\n" for node, address in {"localhost": "127.0.0.1", **addresses}.items())
        )
        self._addresses = addresses
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        network = (
            f"ip link add lab type bridge; ip addr add {NETWORK}.254/24 dev lab; ip link set lab up; ip link set lo up"
        )
        self._world = Namespaces(f"mount --bind {folder}/hosts /etc/hosts; {network}", log=folder / "world.log")

    def start(self) -> None:
        """Start everything; returns when all nodes can take jobs."""
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "seed-file": "munge.seed",
            "log-file": "munged.log",
        }
        self._daemon(
            self._world, "munged", "--foreground", *(f"--{name}={self.folder / file}" for name, file in files.items())
        )
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon(self._world, "slurmctld", "-D")
        self._until(lambda: "is UP" in self.run("scontrol", "ping", check=False), "slurmctld")
        for node in self.nodes:
            self.boot(node)

    def boot(self, node: str) -> None:
        """Give the node its power, and wait until Slurm knows that it has started."""
        self._boots += 1
        cable = f"cable{self._boots}"
        setup = f"hostname {node}; mount -t tmpfs tmpfs /dev/shm; ip link set lo up"
        self._powered[node] = machine = Namespaces(setup, self._world, self.folder / f"{node}.log")
        ends = [cable, "type", "veth", "peer", "eth0", "netns", str(machine.pid)]
        subprocess.run([*self.reach(), "ip", "link", "add", *ends], check=True)
        self._world.run("ip", "link", "set", cable, "master", "lab", "up")
        machine.run("ip", "addr", "add", f"{self._addresses[node]}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")
        self._daemon(machine, "slurmd", "-D", "-b", "-N", node)
        self._until(
            lambda: not re.match("down|unknown", self.state(node)) and "*" not in self.state(node), f"slurmd of {node}"
        )

    def cut(self, node: str) -> None:
        """Take the node its power: everything on it ends at once."""
        self._powered.pop(node).kill()

    def write_off(self, node: str) -> None:
        """Tell Slurm that the node is lost, as administrators do; else it waits for SlurmdTimeout, five minutes, before
        it ends the jobs there."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def repair(self, node: str) -> None:
        """Give a node that was written off its power again, but no job while anything of before its fall can reach
        that: an old credential, or a message that slurmctld repeats each minute. The one that kills the lost step names
        it by a number that the requeued job's step has too.
        """
        self.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=lost")
        self.boot(node)
        time.sleep(CREDENTIAL_S + 1)
        self._until(lambda: self._unsent() == 0, "the end of slurmctld's messages", seconds=150)
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def _unsent(self) -> int:
        """The messages to nodes that slurmctld has not got rid of."""
        said = re.search(r"Agent queue size: +(\d+)", self.run("sdiag"))
        assert said
        return int(said[1])

    def state(self, node: str) -> str:
        """The node's state, with a star where it does not respond."""
        return self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T").strip()

    def stop(self) -> None:
        self._world.kill()
        for daemon in self._daemons:
            daemon.wait()

    def reach(self) -> list[str]:
        """The command before a command that is to reach Slurm."""
        return ["nsenter", f"--target={self._world.pid}", "--net"]

    def run(self, *command: str, check: bool = True) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(
            [*self.reach(), *command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job (`scontrol show job`); of an array, of its first task."""
        return dict(
            re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", number).splitlines()[0])
        )

    def _daemon(self, place: Namespaces, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    [*place.enter(), *command],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            )

    def _until(self, condition: Callable[[], object], what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what} keeps one waiting:\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of the logs of the daemons."""
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in sorted(self.folder.glob("*.log"))
        )


@contextmanager
def cluster(folder: Path, nodes: Sequence[str] = ("node1", "node2"), gpus: int = 2) -> Iterator[Cluster]:
    """A Slurm of these nodes, with as many pretended GPUs each, runs inside; nothing of it is left afterwards. Its
    files go to `folder`, which everybody must be allowed to enter. Skips the test where that cannot be."""
    require_debian(*PACKAGES)
    if (
        os.geteuid()
        or subprocess.run(
            ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], capture_output=True
        ).returncode
    ):
        pytest.skip("needs root and the right to make namespaces")
    made = Cluster(folder, nodes, gpus)
    try:
        made.start()
        yield made
    finally:
        made.stop()

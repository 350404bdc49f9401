"""The launchers across two hosts: network namespaces, each with an address and a host name of its own."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from debian import require_debian
from launching import LAUNCH, Launched, launched
from processes import run_job

HOSTS = {"alpha": "10.213.0.1", "beta": "10.213.0.2"}
GONE = "10.213.0.3"
WITHIN_S = 60  # twice what it may take


class Network:
    """Two namespaces on a bridge, which stands in a third."""

    def __init__(self) -> None:
        self._names = {name: f"plrd{os.getpid()}-{name}" for name in (*HOSTS, "switch")}

    def up(self) -> None:
        for name in self._names.values():
            self._ip("netns", "add", name)
            self._etc(name).mkdir(parents=True)
            # Which says at once that nobody is there.
            (self._etc(name) / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        self._ip("-n", self._names["switch"], "link", "add", "bridge", "type", "bridge")
        self._ip("-n", self._names["switch"], "link", "set", "bridge", "up")
        for host, address in HOSTS.items():
            self._ip(
                "link",
                "add",
                "eth0",
                "netns",
                self._names[host],
                "type",
                "veth",
                "peer",
                "name",
                host,
                "netns",
                self._names["switch"],
            )
            self._ip("-n", self._names["switch"], "link", "set", host, "master", "bridge", "up")
            self._ip("-n", self._names[host], "address", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", self._names[host], "link", "set", "eth0", "up")
            self._ip("-n", self._names[host], "link", "set", "lo", "up")

            self._ip("-n", self._names[host], "route", "add", "default", "dev", "eth0")

    def name_hosts(self) -> None:
        """Give each host an /etc/hosts as Debian's installer does: its own name is that of a loopback address."""
        for host in HOSTS:
            others = "".join(f"{address} {other}\n" for other, address in HOSTS.items() if other != host)
            (self._etc(self._names[host]) / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host}\n{others}")

    def down(self) -> None:
        for name in self._names.values():
            subprocess.run(["ip", "netns", "delete", name], check=False)
            shutil.rmtree(self._etc(name), ignore_errors=True)

    def cut(self, host: str) -> None:
        """The switch drops the cable to `host`, whose own end stays as it is, and the name server is gone for both."""
        for name in HOSTS:
            (self._etc(self._names[name]) / "resolv.conf").write_text(f"nameserver {GONE}\n")
        self._ip("-n", self._names["switch"], "link", "set", host, "nomaster")

    def on(self, host: str, *command: object) -> list[str]:
        """`command` as it is called on `host`."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self._names[host], *named, *map(str, command)]

    def _etc(self, name: str) -> Path:
        """What `ip netns exec` lays over /etc."""
        return Path("/etc/netns") / name

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def network() -> Iterator[Network]:
    require_debian("iproute2", "procps", "util-linux")
    if os.geteuid():
        pytest.skip("network namespaces need root")
    network = Network()
    try:
        network.up()
        yield network
    finally:
        network.down()


@pytest.fixture(scope="module")
def on_one_host(command, tmp_path_factory):
    """on_one_host(engine) -> family.json of two ranks on this host."""

    def make(engine: str) -> dict:
        run_dir = tmp_path_factory.mktemp("one") / "run"
        ended = run_job(2, command(run_dir, f"engine={engine}"))
        assert ended.status == 0, ended.err
        return family(run_dir)

    return make


def family(run_dir: Path) -> dict:
    return json.loads((run_dir / "family.json").read_text())


def same(found: dict, expected: dict) -> None:
    assert len(found["members"]) == 2 and {member["world_size"] for member in found["members"]} == {2}
    for one, other in zip(
        [found["parent"], *found["members"]], [expected["parent"], *expected["members"]], strict=True
    ):
        assert one["eval"]["ppl"] == pytest.approx(other["eval"]["ppl"], rel=1e-6)


def finished(*launchers: Launched) -> str:
    """What both have said, when both have ended well."""
    for launcher in launchers:
        assert launcher.status() == 0, f"{launchers[0].err}\n{launchers[1].err}"
    return "".join(launcher.out for launcher in launchers)


def torchrun(network: Network, host: str, rendezvous: str, arguments: list[str]):
    return launched(
        network.on(host, LAUNCH / "torchrun.sh", *arguments),
        NNODES=2,
        NPROC=1,
        RDZV=rendezvous,
        GLOO_SOCKET_IFNAME=None,
    )


@pytest.mark.parametrize("rendezvous", ["alpha", f"{HOSTS['beta']}:29511"])
def test_torchrun(network, command, on_one_host, tmp_path, rendezvous):
    """By a name, which its own host takes for a loopback address, and by an address where nobody knows the names."""
    if rendezvous in HOSTS:
        network.name_hosts()
    arguments = command(tmp_path / "run", "engine=fsdp")
    with (
        torchrun(network, "alpha", rendezvous, arguments) as alpha,
        torchrun(network, "beta", rendezvous, arguments) as beta,
    ):
        assert finished(alpha, beta).count("family.png") == 1
    same(family(tmp_path / "run"), on_one_host("fsdp"))


def test_deepspeed_without_ssh(network, command, on_one_host, tmp_path):
    network.name_hosts()
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    arguments = command(tmp_path / "run", "engine=zero3")

    def deepspeed(host: str, rank: int):
        place = {"HOSTFILE": tmp_path / "hosts", "NODE_RANK": rank, "GLOO_SOCKET_IFNAME": None}
        return launched(network.on(host, LAUNCH / "deepspeed.sh", *arguments), **place)

    with deepspeed("alpha", 0) as alpha, deepspeed("beta", 1) as beta:
        assert finished(alpha, beta).count("family.png") == 1
    same(family(tmp_path / "run"), on_one_host("zero3"))


def test_a_host_that_is_cut_off_ends_the_run(network, command, tmp_path):
    run_dir = tmp_path / "run"
    arguments = command(run_dir, "stages.tokens=1e6", "recover.lr=1e-4")
    with (
        torchrun(network, "alpha", HOSTS["alpha"], arguments) as alpha,
        torchrun(network, "beta", HOSTS["alpha"], arguments) as beta,
    ):
        alpha.wait_until(
            lambda: (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").stat().st_size > 0
        )
        network.cut("beta")
        assert (alpha.status(WITHIN_S), beta.status(WITHIN_S)) == (1, 1)
        for here, there in ((alpha, "beta"), (beta, "alpha")):
            (line,) = [line for line in here.err.splitlines() if line.startswith("error: ")]
            assert f"({there}, pid " in line and "gave no sign of life" in line

"""Routes to other hosts, as the kernel has them."""

import os
import socket

import psutil
import pytest

from plrd_train.runtime.network import choose_interface, route_to, route_to_peers

FAR = "198.51.100.7"  # of no host (RFC 5737)


def loopback() -> str:
    (name,) = (
        name
        for name, entries in psutil.net_if_addrs().items()
        if any(entry.address == "127.0.0.1" for entry in entries)
    )
    return name


@pytest.fixture
def default() -> str:
    """The interface of the default route."""
    if (route := route_to(FAR)) is None:
        pytest.skip("this machine has no default route")
    assert route.interface is not None and route.interface != loopback()
    return route.interface


@pytest.fixture
def names(monkeypatch) -> dict[str, str]:
    """What this machine's name service knows besides."""
    known: dict[str, str] = {}
    whole = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **named: whole(known.get(host, host), *rest, **named)
    )
    return known


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_this_machine_is_home(host):
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    route = route_to(host)
    assert route.is_home and route.is_loopback and route.interface == loopback()


def test_another_machine(default):
    route = route_to(FAR)
    assert not route.is_home and not route.is_loopback
    # By its address in that network this machine is home again.
    assert route_to(route.address) == type(route)(route.address, is_home=True)


def test_a_name_that_nobody_knows():
    assert route_to("nowhere.invalid") is None and route_to_peers("nowhere.invalid") is None


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1"])
def test_the_own_name_as_a_loopback_address_is_of_no_use_to_peers(names, default, address):
    names["myself"] = address
    assert route_to("myself").is_home and route_to("myself").is_loopback
    assert route_to_peers("myself").interface == default
    assert route_to_peers("localhost").is_loopback and route_to_peers(address).is_loopback


@pytest.fixture
def chosen(monkeypatch):
    """chosen(the host of rank 0, GLOO_SOCKET_IFNAME or None) -> GLOO_SOCKET_IFNAME afterwards."""

    def choose(master: str, given: str | None = None) -> str | None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")  # to be put back, whatever becomes of it
        if given is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        choose_interface(master)
        return os.environ.get("GLOO_SOCKET_IFNAME")

    return choose


def test_gloo_takes_the_interface_of_the_route(chosen, default):
    assert (chosen("127.0.0.1"), chosen(FAR)) == (loopback(), default)


def test_a_choice_is_kept_and_nothing_is_chosen_blindly(chosen):
    assert (chosen("127.0.0.1", "ib0"), chosen("nowhere.invalid")) == ("ib0", None)

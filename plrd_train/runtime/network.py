"""The network interface over which this machine reaches the other machines of a run.

gloo and torchrun ask for the address that belongs to the machine's own name, which many machines do not know
(containers), or hold for a loopback address (Debian's 127.0.1.1), or know as that of another network. The kernel's
routing table knows the right one.
"""

import contextlib
import ipaddress
import os
import socket
import time
from dataclasses import dataclass

import psutil

from plrd_train.errors import UserError

_ANYWHERE = "192.0.2.1"  # of no host (RFC 5737): the route there is the default one
NAME_S = 15.0  # for a name to be known: that of a container may be announced after its start


@dataclass(frozen=True)
class Route:
    """A route that leaves from this machine's `address`. `is_home`: it leads to this machine itself."""

    address: str
    is_home: bool

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.address).is_loopback

    @property
    def interface(self) -> str | None:
        """The name of the network interface of `address`."""
        for name, addresses in psutil.net_if_addrs().items():
            if any(entry.address.partition("%")[0] == self.address for entry in addresses):
                return name
        return None


def route_to(host: str) -> Route | None:
    """The route to `host`, a name or an address; None where there is none, or the name is not known. Sends nothing."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, target in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # of a datagram socket: it only looks the route up
                address = probe.getsockname()[0].partition("%")[0]
                return Route(
                    address, ipaddress.ip_address(address).is_loopback or address == str(target[0]).partition("%")[0]
                )
    return None


def route_to_peers(host: str) -> Route | None:
    """The route over which `host` and the hosts beside it reach this machine. Where `host` is this machine's own name,
    and means a loopback address here alone, that is the default route."""
    route = route_to(host)
    if route is not None and route.is_loopback and not host.startswith(("localhost", "127.", "::1")):
        return route_to(_ANYWHERE)
    return route


def wait_for_name(host: str) -> None:
    """Return when this machine knows `host`, a name or an address.

    Raises UserError where it does not within `NAME_S` seconds. torch would ask for as long as a collective may take.
    """
    end = time.monotonic() + NAME_S
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > end:
                raise UserError(
                    f"MASTER_ADDR={host}: no host of that name is known ({error}); give one that all reach"
                ) from None
        time.sleep(0.5)


def choose_interface(host: str) -> None:
    """Let gloo take the interface over which this machine reaches `host`, that of rank 0, unless GLOO_SOCKET_IFNAME
    names one. To be called before the process group is made."""
    route = route_to_peers(host)
    if route is not None and route.interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", route.interface)

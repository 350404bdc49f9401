"""A connection between two ranks, and the thread that serves it."""

import contextlib
import json
import math
import os
import selectors
import socket
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

from plrd_train.runtime import heartbeat
from plrd_train.runtime.heartbeat import Heartbeat

TICK_S = 0.25


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens (one of `hosts` is reachable), the token that proves a caller to be of the run, and rank 0's
    `name`."""

    hosts: tuple[str, ...]
    port: int
    token: str
    name: str

    def __str__(self) -> str:
        return " or ".join(f"{host}:{self.port}" for host in self.hosts)


def my_name() -> str:
    """Host and process, as lines of the log name them."""
    return f"{socket.gethostname()}, pid {os.getpid()}"


class Link:
    """One end of a connection. Messages are lines of JSON, of a few bytes, so that the kernel takes each whole."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._rest = connection, b""
        self.open, self.heard = True, time.monotonic()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, **message: Any) -> None:
        """From any thread. What is wrong with the connection shows when it is read."""
        with contextlib.suppress(OSError):
            self._connection.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """All that has come, without waiting; `open` then says whether more can. Raises ValueError where a stranger
        sends no JSON."""
        while self.open:
            try:
                data = self._connection.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.open = bool(data)
            self.heard = time.monotonic() if data else self.heard
            self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]

    def silent(self, now: float) -> bool:
        return now - self.heard > heartbeat.SILENCE_S

    def is_local(self) -> bool:
        """Whether the other end is on this host. One that is gone counts as here."""
        with contextlib.suppress(OSError):
            return self._connection.getpeername()[0] == self._connection.getsockname()[0]
        return True

    def close(self) -> None:
        self._connection.close()


class Served(Heartbeat):
    """A heartbeat with a thread of its own, `serve`, which the main thread asks by setting a field and ringing."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._bell, self._far_bell = socket.socketpair()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._may_speak, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._looked = 0.0
        self._since, self._allowed = 0.0, math.inf

    def expect(self, seconds: float | None) -> None:
        self._since, self._allowed = time.monotonic(), math.inf if seconds is None else seconds

    def _late(self, now: float) -> float:
        """The seconds for which this rank has made no progress, where these are too many; else 0."""
        waited = now - self._since
        return waited if waited > self._allowed else 0.0

    def serve(self) -> None:
        """Watch until the run is over."""
        raise NotImplementedError

    def _run(self) -> None:
        self._looked = time.monotonic()
        try:
            self.serve()
        except BaseException:  # unwatched, the others would wait for ever
            traceback.print_exc()
            os._exit(1)

    def _ring(self) -> None:
        self._far_bell.send(b"!")

    def _ready(self) -> set[Link]:
        """The links that can be read, after at most a tick."""
        found = [key.fileobj for key, _ in self._selector.select(TICK_S)]
        if self._bell in found:
            self._bell.recv(1 << 10)
        return {link for link in found if isinstance(link, Link)}

    def _stood_still(self, now: float) -> bool:
        """Whether this process, or the machine under it, was the silent one. To be asked in each turn."""
        before, self._looked = self._looked, now
        stood_still = now - before > heartbeat.SILENCE_S / 2
        if stood_still:
            self._since = now
        return stood_still

    def _ended_by_thread(self, status: int) -> NoReturn:
        self._ring()
        time.sleep(heartbeat.JOIN_S)
        os._exit(status)

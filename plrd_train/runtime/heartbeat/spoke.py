"""The side of every other rank: it watches rank 0, which tells it about the rest."""

import os
import selectors
import socket
import time
from collections.abc import Iterable
from typing import Any, NoReturn

from plrd_train.errors import UserError
from plrd_train.runtime import heartbeat
from plrd_train.runtime.heartbeat.link import Address, Link, Served, my_name
from plrd_train.runtime.heartbeat.whereabouts import whereabouts


class Spoke(Served):
    """The heartbeat of a rank that is not 0."""

    def __init__(self, rank: int, address: Address):
        """Connect to rank 0. Raises UserError where it does not answer."""
        super().__init__()
        self._zero, self._heir = address.name, False
        self._link = self._call(rank, address)
        self._selector.register(self._link, selectors.EVENT_READ)
        self._thread.start()

    def _call(self, rank: int, address: Address) -> Link:
        for host in address.hosts:
            try:
                link = Link(socket.create_connection((host, address.port), timeout=heartbeat.JOIN_S / 2))
            except OSError:
                continue
            link.send(token=address.token, rank=rank, name=my_name())
            with selectors.DefaultSelector() as answer:
                answer.register(link, selectors.EVENT_READ)
                if answer.select(heartbeat.JOIN_S / 2) and (said := link.receive()):
                    self._heed(said)
                    return link
            link.close()
        raise UserError(
            f"rank {rank} does not reach rank 0 ({address.name}) at {address}; let the hosts of a run reach each "
            "other on all ports"
        )

    def first_to_fail(self, status: int, *, own: bool) -> bool:
        if not self._done.is_set():
            self._link.send(failed=status, own=own)
            self._may_speak.wait()
        return True

    def leave(self, status: int) -> NoReturn:
        if not self._may_speak.is_set():
            self._link.send(failed=status, own=True)
        heartbeat.flush()
        os._exit(status)

    def abort(self, message: str) -> NoReturn:
        self.first_to_fail(1, own=True)
        heartbeat.say(message)
        os._exit(1)

    def close(self) -> None:
        self._link.send(bye=1)
        self._done.wait()

    # The thread

    def serve(self) -> None:
        lost_at, beat_due, reported = None, 0.0, False
        while not self._done.is_set():
            if self._link in self._ready():
                self._heed(self._link.receive())
                if not self._link.open:
                    self._selector.unregister(self._link)
            now = time.monotonic()
            if self._stood_still(now):
                self._link.heard = now
            if now >= beat_due:
                self._link.send(beat=1)
                beat_due = now + heartbeat.BEAT_S
                if (late := self._late(now)) and not reported:
                    self._link.send(late=late)
                reported = bool(late)
            if self._done.is_set() or (self._link.open and not self._link.silent(now)):
                continue
            lost_at = lost_at or now
            if now >= lost_at + heartbeat.SETTLE_S:  # what ended rank 0 may be about to end this one, too
                if self._heir:
                    how = heartbeat.silence(now - self._link.heard) if self._link.open else heartbeat.DEATH
                    heartbeat.say(f"rank 0 ({self._zero}) {how}; {heartbeat.GO_ON}")
                os._exit(1)
        self._link.close()

    def _heed(self, messages: Iterable[dict[str, Any]]) -> None:
        for message in messages:
            if "end" in message:
                os._exit(message["end"])
            if "where" in message:
                self._link.send(at=whereabouts())
            if "heir" in message:
                self._heir = True
            if "bye" in message:
                self._done.set()
            if "bye" in message or "speak" in message:
                self._may_speak.set()

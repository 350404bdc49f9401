"""Rank 0's side: it watches all other ranks, and decides which one is the cause of a failure."""

import hmac
import os
import secrets
import selectors
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from plrd_train.errors import UserError
from plrd_train.runtime import heartbeat
from plrd_train.runtime.heartbeat.link import TICK_S, Address, Link, Served, my_name
from plrd_train.runtime.heartbeat.whereabouts import whereabouts


@dataclass(eq=False)
class _Peer:
    rank: int
    name: str
    link: Link
    left: bool = False  # in order
    at: tuple[str, bool] | None = None  # where it stands, and whether it waits there for others

    def __str__(self) -> str:
        return f"{self.rank} ({self.name})"


class _Claim:
    """A rank that fails; `peer` None: rank 0 itself. It may print why from the time `due` on."""

    def __init__(self, peer: _Peer | None, status: int, own: bool):
        self.peer, self.status, self.own = peer, status, own
        self.due = time.monotonic() + (0 if own else heartbeat.DOUBT_S)

    @property
    def alive(self) -> bool:
        return self.peer is None or self.peer.link.open


@dataclass(frozen=True)
class _Verdict:
    """All ranks end with this status, after this message."""

    status: int
    message: str | None = None


class Hub(Served):
    """The heartbeat of rank 0."""

    def __init__(self, size: int, host: str):
        """Listen for the other ranks of `size`, which know this machine as `host`."""
        super().__init__()
        everywhere = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if everywhere else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=everywhere)
        hosts = (host, socket.gethostname())
        self.address = Address(hosts, self._listener.getsockname()[1], secrets.token_hex(16), my_name())
        self._size = size
        self._peers: dict[int, _Peer] = {}
        self._ranks: dict[Link, int] = {}
        self._claims: list[_Claim] = []
        self._speaker: _Claim | None = None
        self._lost_at: float | None = None
        self._verdict: _Verdict | None = None
        self._late_by, self._inquired = 0.0, 0.0  # seconds without progress; when the ranks were asked about it

    def start(self) -> "Hub":
        """Accept the connections of all other ranks and begin to watch them. Raises UserError where one does not
        connect."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        callers: set[Link] = set()
        end = time.monotonic() + heartbeat.JOIN_S
        while missing := {*range(1, self._size)} - {*self._peers}:
            for caller in self._ready() & callers:
                if self._greeted(caller):
                    callers.remove(caller)
                elif not caller.open:
                    callers.remove(caller)
                    self._forget(caller)
            try:
                callers.add(caller := Link(self._listener.accept()[0]))
                self._selector.register(caller, selectors.EVENT_READ)
            except BlockingIOError:
                pass
            if time.monotonic() > end:
                where = f"rank 0 ({self.address.name}) at {self.address}"
                raise UserError(
                    f"rank {min(missing)} does not reach {where}; let the hosts of a run reach each other on all ports"
                )
        for stranger in callers:
            self._forget(stranger)
        self._selector.unregister(self._listener)
        self._listener.close()
        self._peers = dict(sorted(self._peers.items()))
        self._ranks = {peer.link: rank for rank, peer in self._peers.items()}
        min(self._peers.values(), key=lambda peer: (peer.link.is_local(), peer.rank)).link.send(heir=True)
        self._thread.start()
        return self

    def _greeted(self, caller: Link) -> bool:
        """Whether `caller` has shown itself to be a rank; a stranger that sends something else is closed."""
        try:
            (hello,) = caller.receive()
            if not hmac.compare_digest(hello["token"], self.address.token):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            caller.open = False
            return False
        self._peers[hello["rank"]] = _Peer(hello["rank"], hello["name"], caller)
        caller.send(welcome=True)
        return True

    def _forget(self, link: Link) -> None:
        self._selector.unregister(link)
        link.close()

    def first_to_fail(self, status: int, *, own: bool) -> bool:
        if not self._done.is_set():
            self._claims.append(_Claim(None, status, own))
            self._ring()
            self._may_speak.wait()
        return True

    def leave(self, status: int) -> NoReturn:
        heartbeat.flush()
        if self._done.is_set():
            os._exit(status)
        self._verdict = _Verdict(status)
        self._ended_by_thread(status)

    def abort(self, message: str) -> NoReturn:
        self._verdict = _Verdict(1, message)
        self._ended_by_thread(1)

    def close(self) -> None:
        self._done.set()
        self._ring()
        self._thread.join(heartbeat.BEAT_S)

    # The thread

    def serve(self) -> None:
        beat_due = look_due = 0.0
        while not self._done.is_set():
            self._listen(self._ready())
            now = time.monotonic()
            if self._stood_still(now):
                self._listen(self._ready())
                if not all(peer.link.open or peer.left for peer in self._peers.values()):
                    os._exit(1)  # the others have given this rank up, and said so
                for peer in self._peers.values():
                    peer.link.heard = now
            if now >= beat_due:
                self._tell(beat=1)
                beat_due = now + heartbeat.BEAT_S
            if now >= look_due:  # not after each beat of hundreds of ranks
                if verdict := self._verdict or self._judge(now):
                    self._end(verdict)
                look_due = now + TICK_S / 5
        self._tell(bye=1)
        self._linger(1.0)

    def _listen(self, links: Iterable[Link]) -> None:
        for link in links:
            peer = self._peers[self._ranks[link]]
            for message in link.receive():
                if "failed" in message:
                    self._claims.append(_Claim(peer, message["failed"], message["own"]))
                peer.left |= "bye" in message
                self._late_by = max(self._late_by, message.get("late", 0.0))
                peer.at = tuple(message["at"]) if "at" in message else peer.at
            if not link.open:
                self._forget(link)

    def _judge(self, now: float) -> _Verdict | None:
        if self._speaker is not None:
            over = not self._speaker.alive or now > self._speaker.due + heartbeat.SPEECH_S
            return _Verdict(self._speaker.status) if over else None
        failed = {claim.peer for claim in self._claims if claim.own or claim.alive}
        watched = [peer for peer in self._peers.values() if not peer.left and peer not in failed]
        dead = [peer for peer in watched if not peer.link.open]
        silent = [peer for peer in watched if peer.link.open and peer.link.silent(now)]
        if dead or silent:
            self._lost_at = self._lost_at or now
            # A host that is lost is lost with all its ranks, whose last beats are up to a beat apart.
            settled = now >= self._lost_at + (heartbeat.SETTLE_S if dead else heartbeat.BEAT_S)
            return _Verdict(1, _what_happened(dead, silent, now)) if settled else None
        self._late_by = max(self._late_by, self._late(now))
        if self._late_by and not self._claims:
            return self._inquire(now)
        if self._claims and now >= self._claims[0].due:
            self._speaker = self._claims[0]
            if self._speaker.peer is None:
                self._may_speak.set()
            else:
                self._speaker.peer.link.send(speak=True)
        return None

    def _inquire(self, now: float) -> _Verdict | None:
        """A rank makes no progress: ask all ranks where they are, and decide when they have answered."""
        if not self._inquired:
            self._inquired = now
            self._tell(where=1)
        elif self._since > self._inquired:  # it has made progress after all
            self._late_by = self._inquired = 0.0
            for peer in self._peers.values():
                peer.at = None
            return None
        peers = [peer for peer in self._peers.values() if not peer.left]
        if now < self._inquired + heartbeat.INQUIRY_S and any(peer.at is None for peer in peers):
            return None
        found = {
            f"0 ({self.address.name})": whereabouts(),
            **{str(peer): peer.at or ("a place that it does not tell", False) for peer in peers},
        }
        return _Verdict(1, _who_hangs(found, self._late_by))

    def _end(self, verdict: _Verdict) -> NoReturn:
        if verdict.message:
            heartbeat.say(verdict.message)
        self._tell(end=verdict.status)
        self._linger(2.0)
        os._exit(verdict.status)

    def _tell(self, **message: int) -> None:
        for peer in self._peers.values():
            if peer.link.open:
                peer.link.send(**message)

    def _linger(self, seconds: float) -> None:
        """Wait until the others have closed their connections: closing one with unread input may lose the output."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(
            peer.link.open and not peer.link.silent(time.monotonic()) for peer in self._peers.values()
        ):
            self._listen(self._ready())


def _what_happened(dead: Sequence[_Peer], silent: Sequence[_Peer], now: float) -> str:
    said = [f"{_ranks(dead)} {heartbeat.DEATH}"] if dead else []
    if silent:
        said.append(f"{_ranks(silent)} {heartbeat.silence(now - max(peer.link.heard for peer in silent))}")
    return f"{' and '.join(said)}; {heartbeat.GO_ON}"


def _who_hangs(found: Mapping[str, tuple[str, bool]], seconds: float) -> str:
    """Those that wait for nobody come first: they are what the others wait for."""
    places: dict[tuple[bool, str], list[str]] = {}
    for rank, (place, waits) in found.items():
        places.setdefault((waits, place), []).append(rank)
    said = [f"{_ranks(places[key])} {'waits' if key[0] else 'is'} in {key[1]}" for key in sorted(places)]
    return f"no progress for {seconds:.0f} s: {'; '.join(said)}; {heartbeat.GO_ON}"


def _ranks(peers: Sequence[object], most: int = 8) -> str:
    more = f" and {len(peers) - most} more" if len(peers) > most else ""
    return f"rank{'s' if len(peers) > 1 else ''} {', '.join(map(str, peers[:most]))}{more}"

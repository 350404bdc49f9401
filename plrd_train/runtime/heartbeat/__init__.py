"""Failure detection among ranks. When a rank dies or stops responding, all ranks end within half a minute; when one
hangs, within minutes. One line in the log says why.

A collective waits for a dead rank until its timeout, half an hour here, so ranks are watched beside the collectives.
Every rank has a TCP connection to rank 0, and a thread at each end sends a beat every two seconds.

- The kernel closes the connection of a process that ends. So rank 0 knows of a dead rank at once, before collectives
  raise errors in the ranks that wait for it.
- A suspended process, and a host without power or network, go silent. Silence counts after 20 s, since C code may hold
  the interpreter for some seconds.
- A rank that hangs still sends beats. So each rank announces how soon it will make progress (`expect`). If it does
  not, rank 0 asks all ranks where they are (whereabouts.py), and prints that.
- A rank that raises an exception asks rank 0 before it prints it. The first to ask is the cause and prints; the others
  end silently, since their exceptions follow from it.

Rank 0 decides alone (hub.py), prints the line, and tells the others to end. If rank 0 itself is lost, its heir prints
the line: a rank that rank 0 named at the start, on another host if there is one. The line comes twice only where the
network splits ranks that are all alive. It is missing where rank 0 and its heir are lost together.
"""

import os
import sys
from typing import NoReturn

BEAT_S = 2.0
SILENCE_S = 20.0
SETTLE_S = 0.5  # from the first rank that is lost to the verdict: ranks of one host are lost together
DOUBT_S = 1.0  # an exception that nobody foresaw is taken for a rank's own if no other rank is lost for so long
SPEECH_S = 10.0  # for a rank to say why it fails
JOIN_S = 60.0
INQUIRY_S = 2.0  # for the ranks to say where they stand
GO_ON = "the same command goes on from the last checkpoint"


class Heartbeat:
    """The interface of a rank to failure detection. This class is that of a single rank, and detects nothing."""

    def first_to_fail(self, status: int, *, own: bool) -> bool:
        """Report that this rank fails and will `leave` with `status`. Returns True if this rank is the cause and should
        print why. Where another rank is the cause, ends the process; with `own` false, waits a second for that to
        show."""
        return True

    def leave(self, status: int) -> NoReturn:
        """End this process at once with this exit status, and the other ranks with it. A normal exit would wait for
        them in the process group."""
        flush()
        os._exit(status)

    def abort(self, message: str) -> NoReturn:
        """Print `message` as an error and end all ranks with status 1. Any thread may call it."""
        say(message)
        os._exit(1)

    def expect(self, seconds: float | None) -> None:
        """Announce that this rank will call this again within so many seconds; if it does not, it hangs. None: no limit
        is known."""

    def close(self) -> None:
        """Stop watching this rank, which is done. The other ranks wait here for rank 0, because a launcher kills the
        rest once one rank has ended with an error status."""


def flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def say(message: str) -> None:
    """Print an error without Python's buffer, whose lock another thread may hold."""
    os.write(2, f"error: {message}\n".encode(errors="backslashreplace"))


def silence(seconds: float) -> str:
    return f"gave no sign of life for {seconds:.0f} s (stopped, or its host or network is down)"


DEATH = "died without a word (killed? out of memory?)"

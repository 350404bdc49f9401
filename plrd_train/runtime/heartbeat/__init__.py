"""Ranks watch each other: one that dies or stands still takes the others down within half a minute, one that hangs does
so in minutes, and the log says so once.

A collective waits for a rank that is gone until its own timeout, half an hour here, so something beside the collectives
has to look. Every rank holds one TCP connection to rank 0, each end served by a thread that sends a beat every two
seconds. The kernel closes the connection of a process that ends, however it ends, so rank 0 knows that at once, before
the errors which collectives raise in the ranks that were waiting. A process that is stopped, and a host that lost its
power or network, fall silent, which counts after 20 s: long enough for C code that holds the interpreter for some
seconds. Rank 0 alone judges (hub.py), says what happened, and tells the rest to leave. Where rank 0 is the one that is
lost, its heir says so: a rank that rank 0 named at the start, on another host if there is one. So a line comes twice
only where the network parts ranks that all live, and none comes where rank 0 and its heir are lost together.

A rank that hangs in a collective, or in something else while the others wait for it, beats on. So each rank says how
soon it will have made progress (`expect`); where that does not come, rank 0 asks all of them where they stand
(whereabouts.py), and says that.

A rank that fails by itself asks rank 0 before it says why. The first to ask is the cause, and speaks; what the others
raise then comes from it.
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
    """What a rank and the others know of each other. This one is of a rank that is alone."""

    def first_to_fail(self, status: int, *, own: bool) -> bool:
        """This rank fails, and will `leave` with `status`. Returns True if it is to say why; where another rank is the
        cause, the process ends in here. With `own` false that may be so, and shows within a second."""
        return True

    def leave(self, status: int) -> NoReturn:
        """End this process at once with this exit status, and the other ranks with it. An orderly exit would wait in
        the process group for them."""
        flush()
        os._exit(status)

    def abort(self, message: str) -> NoReturn:
        """Say `message` as an error and end all ranks, with status 1. For any thread."""
        say(message)
        os._exit(1)

    def expect(self, seconds: float | None) -> None:
        """This rank makes progress, and calls this again, within so many seconds, or hangs. None: nobody knows how long
        it will take."""

    def close(self) -> None:
        """This rank is done, and watched no longer. The others wait here for rank 0: a launcher ends the rest when one
        has ended with a status."""


def flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def say(message: str) -> None:
    """Print an error without Python's buffer, whose lock another thread may hold."""
    os.write(2, f"error: {message}\n".encode(errors="backslashreplace"))


def silence(seconds: float) -> str:
    return f"gave no sign of life for {seconds:.0f} s (stopped, or its host or network is down)"


DEATH = "died without a word (killed? out of memory?)"

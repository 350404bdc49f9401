"""Requests to stop: a signal to any rank, or the file `stop` in run_dir."""

import os
import signal
from pathlib import Path
from types import FrameType

# Those that schedulers, launchers, terminals and people send.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STATUS = 75  # the exit status of a run that was asked to stop (EX_TEMPFAIL): the same command continues it


class Stopped(Exception):  # noqa: N818  # it is no error
    """The run was asked to stop, and has saved a checkpoint. All ranks raise it at the same place, which the message
    names."""


class StopRequest:
    """Whether this run was asked to stop. Installs the handlers of this process; a second interrupt (Ctrl-C) ends the
    process at once."""

    def __init__(self) -> None:
        self._signalled = False
        self._file: Path | None = None
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores the end of the terminal
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            os._exit(128 + number)
        self._signalled = True

    def watch(self, file: Path) -> None:
        """Count the appearance of `file` as a request, too. A `file` that exists already was meant for an earlier run,
        and is removed."""
        file.unlink(missing_ok=True)
        self._file = file

    def asked(self) -> bool:
        """Not a collective: ranks may see a request at different times, and must agree before they act on it."""
        return self._signalled or (self._file is not None and self._file.exists())

    def done(self) -> None:
        """Remove the file, now that the run has stopped."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

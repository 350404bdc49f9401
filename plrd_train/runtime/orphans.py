"""Workers die with their launcher.

A worker whose launcher was killed would train on, or hang, where nobody sees it, hold its device, and meet the
restarted run in the same run_dir. The kernel ends it instead (Linux's PR_SET_PDEATHSIG; other systems have no such
thing, and workers there live on), by SIGKILL: a signal that asks for an orderly stop is of no use to a rank that hangs
in a collective, and nobody is left to wait for its checkpoint, which takes all ranks.

The kernel sends the signal when the thread that started the worker ends. torchrun and deepspeed start workers in their
main threads.
"""

import ctypes
import os
import signal
import sys

# Imported before anything else of this package, so that a launcher which dies during the imports, which take seconds,
# is missed below.
_STARTED = os.getpid(), os.getppid()
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher() -> None:
    """Let the kernel kill this process when its launcher dies; where that is so already, end here. For a process that a
    launcher started."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    pid, launcher = _STARTED
    if os.getpid() == pid and os.getppid() != launcher:
        os._exit(1)

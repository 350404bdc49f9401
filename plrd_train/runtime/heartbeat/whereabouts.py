"""The place in the code where a process is, for the line that names the rank that hangs."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_HOME = str(Path(__file__).resolve().parents[2])
# Where ranks wait for one another: the collectives, and what engines build of them.
_COLLECTIVE = ("/torch/distributed/", "/deepspeed/comm/")
_WRAPPERS = {"wrapper", "wait", "get_fn", "log_wrapper"}


def whereabouts() -> tuple[str, bool]:
    """The place of the main thread, in words, and whether it waits for other ranks there. Called in another thread."""
    stacks = [list(_outwards(frame)) for frame in _workers()]
    # Gradients may be reduced by a thread of autograd's, which the main thread waits for.
    for stack in stacks:
        waits_in = [
            frame.f_code.co_name for frame in stack if any(part in frame.f_code.co_filename for part in _COLLECTIVE)
        ]
        if waits_in:
            named = next((name for name in waits_in if name not in _WRAPPERS), waits_in[0])
            return f"{named} ({_ours(stacks[0])})", True
    return _ours(stacks[0]), False


def _workers() -> Iterator[FrameType]:
    """The innermost frame of the main thread, and those of threads that Python has not started."""
    frames, main = sys._current_frames(), threading.main_thread().ident
    known = {thread.ident for thread in threading.enumerate()}
    if main in frames:
        yield frames[main]
    yield from (frame for thread, frame in frames.items() if thread not in known)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _ours(stack: list[FrameType]) -> str:
    """The innermost place of this package."""
    for frame in stack:
        file = frame.f_code.co_filename
        if file.startswith(_HOME):
            return f"plrd_train{file.removeprefix(_HOME)}:{frame.f_lineno}, {frame.f_code.co_name}"
    return f"{stack[0].f_code.co_filename}:{stack[0].f_lineno}"

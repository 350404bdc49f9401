"""The memory that the ranks of a job really take, phase by phase, as the kernel counts it."""

import ctypes
import functools
import gc
import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

PHASES = {
    "plrd_train.stages.resume:evaluate": "evaluate",
    "plrd_train.stages.compress:factor": "factor",
    "plrd_train.engine.fsdp:FSDP.rebuild": "rebuild",
    "plrd_train.engine.zero3:Zero3.rebuild": "rebuild",
    "plrd_train.stages.compress:evaluate_factored": "evaluate",
    "plrd_train.pipeline:recover": "recover",
    "plrd_train.pipeline:evaluate": "evaluate",
    "plrd_train.pipeline:publish": "publish",
}


def watch(rank: int, folder: Path, phases: int) -> None:
    """Write the peaks of the first `phases` phases of this rank to the file `folder/RANK`, and leave with all others:
    for `processes.run_job`."""
    map_tensors()
    file = folder / str(rank)
    file.touch()
    for where, phase in PHASES.items():
        module, _, path = where.partition(":")
        *outer, name = path.split(".")
        owner: Any = functools.reduce(getattr, outer, importlib.import_module(module))
        setattr(owner, name, _watched(getattr(owner, name), phase, file, phases))


def _watched(function: Callable[..., Any], phase: str, file: Path, phases: int) -> Callable[..., Any]:
    def watched(*arguments: Any, **named: Any) -> Any:
        result, peak = measured(lambda: function(*arguments, **named))
        with file.open("a") as out:
            out.write(json.dumps([phase, peak]) + "\n")
        if _lines(file) == phases:
            # A rank that goes takes the others with it.
            while any(_lines(other) < phases for other in file.parent.iterdir()):
                time.sleep(0.05)
            os._exit(0)
        return result

    return watched


def map_tensors() -> None:
    """Tell malloc to map each tensor apart from here on, so that it goes back to the kernel when it is freed."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 0)  # M_TRIM_THRESHOLD


def measured(run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` returns, and the most bytes of tensors that this process held at once meanwhile, all of them made
    after `map_tensors`.

    That is the resident memory at its highest (VmHWM, which is reset before), less what is no tensor at the end: code,
    and what libraries keep.
    """
    libc = ctypes.CDLL(None)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    result = run()
    peak = _memory("VmHWM")
    gc.collect()
    libc.malloc_trim(0)
    return result, peak - (_memory("VmRSS") - _live())


def _live() -> int:
    """Bytes of all tensors, each storage once. By type(): isinstance would ask the lazy modules of libraries, which
    takes seconds."""
    tensors = [
        t
        for t in gc.get_objects()
        if issubclass(type(t), Tensor) and not issubclass(type(t), DTensor) and not t.is_meta
    ]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def _memory(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024

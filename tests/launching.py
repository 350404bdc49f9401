"""The launch scripts, started as their users start them."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
TIMEOUT_S = 240


@dataclass(frozen=True)
class Launched:
    """A launcher that runs, and what it and its workers have written so far."""

    process: subprocess.Popen
    folder: str

    @property
    def out(self) -> str:
        return Path(f"{self.folder}/out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self.folder}/err").read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait while the launcher runs; it must not end before the condition holds."""
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, (
                f"{self.process.args}:\n{self.out}\n{self.err}"
            )
            time.sleep(0.05)

    def status(self, timeout: float = TIMEOUT_S) -> int:
        """The exit status, waited for."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.process.args} did not end within {timeout} s:\n{self.out}\n{self.err}") from None


@contextmanager
def launched(command: Sequence[str | Path], **environment: object) -> Iterator[Launched]:
    """`command` runs with one thread a rank and these environment variables (None: unset); what is left of it is killed
    at the end."""
    wanted = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in environment.items() if value is not None},
    }
    for name in (name for name, value in environment.items() if value is None):
        wanted.pop(name, None)
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/out", "w") as out, open(f"{folder}/err", "w") as err:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=wanted,
            start_new_session=True,
        )
        try:
            yield Launched(process, folder)
        finally:
            if process.poll() is None:
                for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    one.kill()
            process.wait()

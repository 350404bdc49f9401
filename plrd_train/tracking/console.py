"""What the main rank prints for people: lines, progress bars, and tables.

On a terminal a progress bar moves. Elsewhere (a log file, a pipe) it prints a plain line at most every ten seconds,
without control characters.
"""

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from plrd_train.family import Family
from plrd_train.tracking.table import HEADERS, count, family_rows

_LINE_SECONDS = 10.0
_SPEED_SECONDS = 600.0  # the rate is a mean over at most this long: one step of a large model may take a minute
_TABLE_WIDTH = 120

_main = True
_to_stderr = False
_bars: Progress | None = None  # the bars on the terminal, shared by everything that makes progress at the same time


def set_main(main: bool, *, to_stderr: bool = False) -> None:
    """Set whether this process prints, and whether it prints to standard error (for --json)."""
    global _main, _to_stderr
    _main, _to_stderr = main, to_stderr


def say(line: str) -> None:
    """Print one line, above the bars where there are any."""
    if not _main:
        return
    if _bars is not None:
        _bars.console.print(Text(line), soft_wrap=True)
    else:
        print(line, file=_stream(), flush=True)


class Bar:
    """Progress of one piece of work."""

    def __init__(self, bars: Progress, task: TaskID, plain: bool):
        self._bars, self._id, self._plain = bars, task, plain
        self._printed = time.monotonic()

    def update(self, n: float, **fields: float | str) -> None:
        """Count `n` more units as done, and show `fields` (a loss, a learning rate) from now on."""
        text = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, (int, float)) else f"{name} {value}"
            for name, value in fields.items()
        )
        self._bars.update(self._id, advance=n, fields=text or self._task.fields["fields"])
        task = self._task
        if self._plain and not task.finished and time.monotonic() - self._printed >= _LINE_SECONDS:
            self._print(task, f"{_duration(task.time_remaining)} left" if task.time_remaining else "")
            self._printed = time.monotonic()

    def end(self) -> None:
        """Show how much was done and how long it took."""
        task = self._task
        if self._plain:
            self._print(task, f"took {_duration(task.elapsed or 0)}")
        else:
            self._bars.stop_task(self._id)

    @property
    def _task(self) -> Task:
        return next(task for task in self._bars.tasks if task.id == self._id)

    def _print(self, task: Task, when: str) -> None:
        parts = (f"{_share(task)} {task.fields['unit']}", _rate(task), when, task.fields["fields"])
        say(f"{task.description}: {', '.join(filter(None, parts))}")


@contextmanager
def progress(description: str, total: float, unit: str) -> Iterator[Bar]:
    """Show the progress of `total` units of work while the block runs. Bars may be nested."""
    global _bars
    terminal = _main and _stream().isatty() and os.environ.get("TERM") != "dumb"
    outermost = _bars is None
    bars = _bars or _new_bars(disable=not terminal)
    if terminal and outermost:
        bars.start()
        _bars = bars
    task = bars.add_task(description, total=total, unit=unit, fields="")
    bar = Bar(bars, task, plain=not terminal)
    try:
        yield bar
    finally:
        bar.end()
        if terminal and outermost:
            bars.stop()
            _bars = None


def family_table(family: Family) -> None:
    """Print the parent and its members as a table in a frame."""
    _print_table(Table(), HEADERS, family_rows(family.parent, family.members))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> None:
    """Print a plain table. The first column and those of the numbers `left`, counted from 0, are aligned on the left,
    all others on the right. A row may be shorter than the header."""
    frameless = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True, header_style="")
    _print_table(frameless, header, rows, left)


def _print_table(
    table: Table, header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = ()
) -> None:
    if not _main:
        return
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 or number in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    stream = _stream()
    terminal = stream.isatty()
    width = None if terminal else max(_TABLE_WIDTH, Console(width=10_000).measure(table).maximum)
    Console(file=stream, force_terminal=terminal, no_color=not terminal, width=width).print(table)


def _stream() -> TextIO:
    return sys.stderr if _to_stderr else sys.stdout


def _new_bars(disable: bool) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=5, max_width=40)),
        _Written(_share),
        _Written(_rate),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[fields]}", markup=False, table_column=Column(no_wrap=True)),
    )
    return Progress(
        *columns,
        console=Console(file=_stream()),
        expand=True,
        disable=disable,
        speed_estimate_period=_SPEED_SECONDS,
        refresh_per_second=4,
    )


class _Written(ProgressColumn):
    """A column that a function of the task writes."""

    def __init__(self, write: Callable[[Task], str]):
        super().__init__(Column(no_wrap=True))
        self._write = write

    def render(self, task: Task) -> Text:
        return Text(self._write(task))


def _share(task: Task) -> str:
    return f"{count(task.completed)}/{count(task.total)}"


def _rate(task: Task) -> str:
    speed = task.finished_speed or task.speed
    return f"{count(speed)} {task.fields['unit']}/s" if speed else ""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"

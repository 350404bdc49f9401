"""What a person sees, with a terminal and without."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from records import member
from tracking.test_tracker import in_a_process

from plrd_train.family import Family, Member, ParentRecord, Scores
from plrd_train.tracking import console

FAMILY = Family(
    Path("runs/family"),
    ParentRecord(path="p", params=3_100_000, eval=Scores(ppl=5.1)),
    [
        Member(
            **member("1.25x", ratio=1.2512, params=2_604_000, tokens_lineage=100_000),
            eval_factored=Scores(ppl=26.3),
            eval=Scores(ppl=5.61),
        ),
        Member(**member("[bold]late[/bold]", ratio=2.25, params=1_550_000), eval_factored=Scores(ppl=float("inf"))),
    ],
)


@pytest.fixture(autouse=True)
def _main_again():
    yield
    console.set_main(True)


def work(steps: int = 5) -> None:
    with console.progress("stage 1: recover", 1000, "tokens") as bar:
        for step in range(steps):
            bar.update(200, loss=3.0 - step / 4, lr=1e-3)
            if step == 1:
                console.say("a line [red]of[/red] text")
                with console.progress("evaluate", 2, "documents") as inner:
                    inner.update(2)


def test_without_a_terminal_plain_lines_come_seldom(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    work()
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"a line \[red\]of\[/red\] text\n"
        r"evaluate: 2/2 documents.*, took 0:00:0\d\n"
        r"stage 1: recover: 1\.00k/1\.00k tokens.*, took 0:00:0\d, loss 2, lr 0\.001\n",
        said,
    )
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)


def test_without_a_terminal_a_long_work_tells_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(console, "_LINE_SECONDS", 0.0)
    work(steps=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stage 1: recover: 200/1.00k tokens") and "loss 3" in lines[0]
    # A work that ends early says how far it came.
    assert any(" left, loss" in line for line in lines) and "600/1.00k" in lines[-1]


def test_on_a_terminal_bars_move_and_lines_stay_whole():
    ours, theirs = pty.openpty()
    code = "from tracking.test_console import *; work()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # how a closed terminal ends on Linux
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    assert "\x1b[" in text and "a line [red]of[/red] text" in text and "1.00k/1.00k" in text and "loss 2" in text
    assert text.rstrip("\r\n").endswith("\x1b[?25h")  # the cursor is back


def test_only_the_main_rank_speaks(capsys):
    console.set_main(False)
    work()
    console.say("no")
    console.family_table(FAMILY)
    assert capsys.readouterr() == ("", "")


def test_standard_output_can_be_kept_free(capsys):
    console.set_main(True, to_stderr=True)
    work()
    console.family_table(FAMILY)
    out, err = capsys.readouterr()
    assert out == "" and "stage 1: recover" in err and "1.25x" in err


def test_the_table_of_a_family(capsys):
    console.family_table(FAMILY)
    said = capsys.readouterr().out
    assert "\x1b" not in said
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    assert cells == [
        ["parent", "1.00", "3.10M", "100%", "-", "5.100", "1.00", "-"],
        ["1.25x", "1.25", "2.60M", "84%", "26.30", "5.610", "1.10", "100k"],
        ["[bold]late[/bold]", "2.25", "1.55M", "50%", "-", "-", "-", "0"],
    ]


def test_a_plain_table_lines_up_and_is_never_cut(capsys):
    wide = "x" * 150
    console.table(["", "number", "text"], [["[red]a", "1", "left"], ["bb", "1234567"], ["c", "2", wide]], left=(2,))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "         number  text",
        "[red]a        1  left",
        "bb      1234567",
        f"c             2  {wide}",
    ]
    console.set_main(False)
    console.table(["a"], [["b"]])
    assert capsys.readouterr().out == ""


def test_a_terminal_that_knows_no_box_drawing_gets_a_table():
    done = in_a_process(
        "from tracking.test_console import FAMILY, console; console.family_table(FAMILY)",
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0 and "1.25x" in done.stdout, done.stderr

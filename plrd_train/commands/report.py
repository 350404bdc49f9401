"""`plrd report`: the page of a family, written again."""

from __future__ import annotations

import argparse
from typing import Any

from plrd_train.commands._arguments import add_family
from plrd_train.tracking import console

HELP = "write the report of a family again and print its path"
EXAMPLES = ("plrd report runs/quickstart",)
add_arguments = add_family


def run(given: argparse.Namespace) -> dict[str, Any]:
    from plrd_train.report.page import write_report

    path = write_report(given.family)[0].resolve()
    if not given.json:
        console.say(str(path))
    return {"report": str(path)}

"""`plrd show`: the table of a family."""

from __future__ import annotations

import argparse
from typing import Any

from plrd_train.commands._arguments import add_family
from plrd_train.family import Family
from plrd_train.tracking import console

HELP = "show the parent and its members: sizes, ratios, perplexities, tokens"
EXAMPLES = ("plrd show runs/quickstart",)
add_arguments = add_family


def run(given: argparse.Namespace) -> dict[str, Any]:
    family = Family.read(given.family)
    if not given.json:
        console.family_table(family)
    members = [
        {**member.to_dict(), "absolute_path": str((family.folder / member.path).resolve())} for member in family.members
    ]
    return {"parent": family.parent.to_dict(), "members": members}

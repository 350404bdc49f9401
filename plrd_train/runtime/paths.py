"""Paths as people write them."""

import os

from plrd_train.errors import UserError


def expanded(path: str) -> str:
    """`path` with the home folder in the place of a leading ~ or ~user. Raises UserError where there is no such
    home."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = path.partition("/")[0]
        raise UserError(f"{path}: {user} is no home folder that is known here; write the path out")
    return found

"""What a run leaves behind: family.json and the members, whole or absent."""

import json
import os
from pathlib import Path
from typing import Any

from plrd_train.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at once: a reader, and a restart, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Family:
    """One parent and its members, as family.json in `folder` lists them (the keys are the contract of docs/concepts.md). Written by rank 0 alone."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.parent: dict[str, Any] = {}
        self.members: list[dict[str, Any]] = []

    @classmethod
    def read(cls, folder: Path, must_exist: bool = True) -> "Family":
        """The family in `folder`, empty where there is none yet. Raises UserError where family.json is missing (if it must exist) or damaged."""
        family, path = cls(folder), folder / "family.json"
        if not path.exists():
            if must_exist:
                raise UserError(f"{folder}: no family.json here; give the run_dir of a family")
            return family
        try:
            content = json.loads(path.read_text())
            family.parent, family.members = dict(content["parent"]), list(content["members"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a family.json ({type(error).__name__}: {error}); restore it, or use another run_dir") from None
        return family

    def has(self, name: str) -> bool:
        return any(member["name"] == name for member in self.members)

    def member_folder(self, name: str) -> Path:
        return self.folder / "members" / name

    def write(self) -> None:
        write_atomically(self.folder / "family.json", json.dumps({"parent": self.parent, "members": self.members}, indent=2, allow_nan=False) + "\n")

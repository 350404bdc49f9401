"""A family: one parent, its members, and the file family.json that lists them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from plrd_train.errors import UserError
from plrd_train.family.records import Member, ParentRecord, Scores
from plrd_train.runtime.files import write_atomically

__all__ = ["Family", "Member", "ParentRecord", "Scores"]


class _File(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    parent: ParentRecord
    members: list[Member]


@dataclass
class Family:
    """The family in `folder`. Rank 0 alone writes it."""

    folder: Path
    parent: ParentRecord
    members: list[Member] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    """Keys of family.json beside "parent" and "members", kept as they are."""

    @classmethod
    def read(cls, folder: Path) -> "Family":
        """The family in `folder`. Raises UserError where family.json is missing, damaged, or names a member outside
        `folder`."""
        family = cls.find(folder)
        if family is None:
            raise UserError(f"{folder}: no family.json here; give the run_dir of a family")
        return family

    @classmethod
    def find(cls, folder: Path) -> "Family | None":
        """As `read`, but None where there is no family.json."""
        path = folder / "family.json"
        if not path.exists():
            return None
        try:
            content = _File.model_validate_json(path.read_bytes())
            _check(content.members, folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a family.json ({_why(error)}); restore it, or use another run_dir") from None
        return cls(folder, content.parent, content.members, content.model_extra or {})

    def has(self, name: str) -> bool:
        return any(member.name == name for member in self.members)

    def member_folder(self, name: str) -> Path:
        return self.folder / "members" / name

    def to_dict(self) -> dict[str, Any]:
        """The content of family.json."""
        members = [member.to_dict() for member in self.members]
        return {"parent": self.parent.to_dict(), "members": members, **self.more}

    def write(self) -> None:
        """Replace family.json atomically."""
        write_atomically(self.folder / "family.json", json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")


def _check(members: list[Member], folder: Path) -> None:
    """Raise ValueError where two members have one name, or one does not lie inside `folder`."""
    names = [member.name for member in members]
    for i, member in enumerate(members):
        if member.name in names[:i]:
            raise ValueError(f"members[{i}]: another member has its name, {member.name}")
        if folder.resolve() not in (folder / member.path).resolve().parents:
            raise ValueError(f"members[{i}]: its path, {member.path}, is not inside this folder")


def _why(error: Exception) -> str:
    """In one line."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    return f"{place}: {first['msg']}" if place else first["msg"]

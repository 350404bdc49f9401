"""What a run leaves behind: family.json and the members, whole or absent."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plrd_train.errors import UserError
from plrd_train.runtime.files import write_atomically


class Family:
    """One parent and its members, as family.json in `folder` lists them (the keys are the contract of
    docs/concepts.md). Written by rank 0 alone."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.parent: dict[str, Any] = {}
        self.members: list[dict[str, Any]] = []

    @classmethod
    def read(cls, folder: Path, must_exist: bool = True) -> "Family":
        """The family in `folder`, empty where there is none yet. Raises UserError where family.json is missing (if it
        must exist) or damaged."""
        family, path = cls(folder), folder / "family.json"
        if not path.exists():
            if must_exist:
                raise UserError(f"{folder}: no family.json here; give the run_dir of a family")
            return family
        try:
            content = json.loads(path.read_text())
            _check(content, folder)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: not a family.json ({type(error).__name__}: {error}); restore it, or use another run_dir"
            ) from None
        family.parent, family.members = content["parent"], content["members"]
        return family

    def has(self, name: str) -> bool:
        return any(member["name"] == name for member in self.members)

    def member_folder(self, name: str) -> Path:
        return self.folder / "members" / name

    def write(self) -> None:
        write_atomically(
            self.folder / "family.json",
            json.dumps({"parent": self.parent, "members": self.members}, indent=2, allow_nan=False) + "\n",
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_ratio(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0


def _is_evaluation(value: Any) -> bool:
    """{"ppl": …}, null where it was not finite; or nothing measured."""
    ppl = value.get("ppl") if isinstance(value, dict) else 0
    return value is None or ppl is None or (type(ppl) in (int, float) and ppl > 0)


def _is_ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


# Of the keys that are read. What a key holds, and a word for it.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("params", "linear_params", "tokens_stage", "tokens_total", "tokens_lineage"),
        (_is_count, "a number of at least 0"),
    ),
    **dict.fromkeys(("ratio", "ratio_requested"), (_is_ratio, "a number")),
    **dict.fromkeys(("eval", "eval_factored"), (_is_evaluation, 'of the form {"ppl": a positive number}')),
    "ranks": (_is_ranks, "of the form {name: rank}"),
    "form": (lambda value: isinstance(value, str), "the name of a form"),
    "path": (lambda value: isinstance(value, str) and "\0" not in value, "a path"),
    "revision": (lambda value: value is None or isinstance(value, str), "a commit"),
}


def _check(content: Any, folder: Path) -> None:
    """Raise ValueError where `content` is not that of the family.json in `folder`, or names a member that does not lie
    there."""
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("parent"), dict)
        or not isinstance(content.get("members"), list)
    ):
        raise ValueError('it needs "parent": {…} and "members": […]')
    entries = {"parent": content["parent"], **{f"members[{i}]": member for i, member in enumerate(content["members"])}}
    for place, entry in entries.items():
        if not isinstance(entry, dict) or "path" not in entry:
            raise ValueError(f'{place} has no "path"')
        for key, (holds, what) in _KINDS.items():
            if key in entry and not holds(entry[key]):
                raise ValueError(f"{place}: its {key} is not {what}")
    names = [member.get("name") for member in content["members"]]
    for i, (name, member) in enumerate(zip(names, content["members"], strict=True)):
        if not isinstance(name, str) or name in names[:i]:
            raise ValueError(f"members[{i}]: its name, {name!r}, is no name, or another member has it")
        if folder.resolve() not in (folder / member["path"]).resolve().parents:
            raise ValueError(f"members[{i}]: its path, {member['path']}, is not inside this folder")

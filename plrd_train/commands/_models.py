"""The models that a verb is given: a member, any other model, or what a family names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from plrd_train.errors import UserError
from plrd_train.family import Family
from plrd_train.tracking import console

if TYPE_CHECKING:
    from plrd_train.config.schema import Config
    from plrd_train.parents.parent import Parent


def find(path: str, revision: str = "main", *, remote_code: bool) -> Parent:
    """The files of the model at `path`, a folder or a hub id. Raises UserError, which names the members where `path` is
    a family."""
    from transformers.utils import logging

    from plrd_train.parents.published import find_published

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "family.json").is_file():
            raise UserError(f"{path}: a family; give one of its members: {_members(folder)}")
        raise UserError(f"{path}: neither a model (no config.json here) nor a family (no family.json)")
    home = family_of(folder)
    if home and not folder.exists():
        raise UserError(f"{path}: no such member here; there are {_members(home)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    files = find_published(path, revision, trust_remote_code=remote_code)
    for note in files.notes:
        console.say(f"note: {note}")
    return files


def family_of(member: Path) -> Path | None:
    """The folder of the family whose members/ holds `member`; None for any other folder."""
    home = member.absolute().parent.parent
    return home if member.absolute().parent.name == "members" and (home / "family.json").is_file() else None


def lies_at(path: str, home: Path, config: Config | None) -> str:
    """Where `path`, a key of the run's `config`, lies now: what was inside the run_dir has moved with it to `home`."""
    if config is not None and Path(path).is_relative_to(config.run_dir):
        inside = home / Path(path).relative_to(config.run_dir)
        return str(inside) if inside.exists() else path
    return path


def _members(home: Path) -> str:
    folders = (home / member.path for member in Family.read(home).members)
    return ", ".join(str(folder) for folder in folders if folder.is_dir()) or "none"

"""Assign shards to splits by the names of folders and files, with the rules of Hugging Face's `datasets`."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Literal

from plrd_train.errors import UserError

Split = Literal["train", "validation"]
# Words and separators of datasets/data_files.py, copied because importing that module takes a second.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SEPARATORS = "-._ 0-9"
_NAME = rf"(^|[{SEPARATORS}])({{}})([{SEPARATORS}]|$)"
_NAMES = {split: re.compile(_NAME.format("|".join(words))) for split, words in WORDS.items()}
_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
# In this form the whole word names the split: train_sft is not train.
_NUMBERED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")


def narrow_to_split(spec: str, names: Sequence[str], split: Split, folder: str | None) -> list[str]:
    """The shards of `split` among `names`, which are relative to the root of the corpus `spec`.

    If no name contains a split, all shards are returned. `folder` is the name of the root, None for a hub dataset. A
    folder named after a split that contains only that split is used whole, whatever `split` is. Raises UserError if the
    split of a shard is ambiguous, or if there is no shard of `split`.
    """
    mend = "download it, and give a glob of its" if folder is None else "give the folder, file or glob to use as"
    mend += f" {split} data"
    of_split: dict[str, list[str]] = {}
    numbered = any(_splits_in(word) for word in map(_numbered_word, names) if word)
    for name in names:
        splits = _splits_of(name, numbered)
        if len(splits) > 1:
            raise UserError(f"{spec}: {name} is named as {' and as '.join(sorted(splits))}; {mend}")
        of_split.setdefault(next(iter(splits), ""), []).append(name)
    unnamed = of_split.pop("", [])
    if not of_split:
        return unnamed
    if unnamed:
        other = min(of_split)
        raise UserError(f"{spec}: {of_split[other][0]} is named as {other}, but {unnamed[0]} as no split; {mend}")
    if split in of_split:
        return of_split[split]
    if folder is not None and len(of_split) == 1 and _splits_in(folder) == of_split.keys():
        return list(names)
    raise UserError(f"{spec}: has {' and '.join(sorted(of_split))} but no {split}; {mend}")


def _splits_of(name: str, numbered: bool) -> frozenset[str]:
    """The splits in the folder and file names of a shard; if `numbered`, only in the word before the number."""
    word = _numbered_word(name) if numbered else None
    if word:
        return frozenset({_SPLIT_OF.get(word, word)})
    return frozenset().union(*map(_splits_in, name.split("/")))


def _numbered_word(name: str) -> str | None:
    match = _NUMBERED.fullmatch(name)
    return match[1] if match else None


@cache
def _splits_in(part: str) -> frozenset[str]:
    """The splits in the name of one folder or file."""
    return frozenset(split for split, pattern in _NAMES.items() if pattern.search(part))

"""Resolve a corpus (a folder, a glob or a Hugging Face dataset) to its list of shards.

Rank 0 resolves it once, and all ranks share the list.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from plrd_train.data.shards import READ_ERRORS
from plrd_train.data.splits import Split, narrow_to_split
from plrd_train.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_SUFFIX = re.compile(r"\.jsonl(\.gz|\.zst)?$")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Corpus:
    """The shards of one split, in their canonical order. JSON-serialisable.

    `shards` are absolute paths or `hf://` URLs, sorted. `revision` is the commit hash of a hub dataset, None for local
    files. `fingerprint` identifies the content without reading it: the revision, or a hash of the local files' relative
    names and sizes, which a moved folder keeps.
    """

    spec: str
    revision: str | None
    shards: tuple[str, ...]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Corpus":
        return cls(**{**saved, "shards": tuple(saved["shards"])})


def resolve_corpus(spec: str, split: Split, revision: str | None = None) -> Corpus:
    """List the shards (.jsonl, .jsonl.gz, .jsonl.zst, at any depth) of `spec`.

    `spec` is tried as a folder, a file, a glob and a hub dataset id, in that order. If the folders or files of a folder
    or dataset are named after splits, only the shards of `split` are listed (`plrd_train.data.splits`). A glob or file
    is used whole. `revision` pins a hub dataset; local files ignore it. A private dataset is read with HF_TOKEN.

    Raises UserError if nothing is found, if no shard is found or all are empty, if the split of a shard is ambiguous,
    if two shards hold the same documents, or if the hub cannot be reached.
    """
    if os.path.isdir(spec):
        names = [os.path.relpath(shard, spec) for shard in _shards_under(spec)]
        narrowed = narrow_to_split(spec, names, split, os.path.basename(os.path.abspath(spec)))
        return _local_corpus(spec, (os.path.join(spec, name) for name in narrowed))
    if os.path.isfile(spec):
        return _local_corpus(spec, (shard for shard in [spec] if shard.endswith(SUFFIXES)))
    if glob.has_magic(spec):
        found = glob.glob(spec, recursive=True)
        if not found:
            raise UserError(
                f"{spec}: this glob matches nothing; quote it so that the shell leaves it alone, and check the path"
            )
        return _local_corpus(
            spec,
            (
                shard
                for one in found
                for shard in (_shards_under(one) if os.path.isdir(one) else [one])
                if shard.endswith(SUFFIXES)
            ),
        )
    if HUB_ID.fullmatch(spec):
        return _hub_corpus(spec, split, revision)
    raise UserError(
        f"{spec}: no such folder; give a folder of {' / '.join(SUFFIXES)} shards, a glob, or a Hugging Face dataset id"
    )


def is_local(spec: str) -> bool:
    """Whether `resolve_corpus` reads `spec` from this machine rather than from the hub."""
    return os.path.exists(spec) or glob.has_magic(spec)


def overlap(read: Corpus, held_out: Corpus, use: str) -> str | None:
    """A note for the user if `read` and `held_out` share shards; None if they do not.

    `use` is the use of `read`: "trained on", "calibrated on". Two shards are the same if their names agree without the
    compression suffix, or if they are links to one local file.
    """
    known = {same for shard in read.shards for same in _same(shard)}
    both = [shard for shard in held_out.shards if not known.isdisjoint(_same(shard))]
    if not both:
        return None
    shared = f"{len(both)} of {len(held_out.shards)} shards, {both[0]} among them"
    return f"note: {use} as well as evaluated on: {shared}; this perplexity is not held out"


def _same(shard: str) -> tuple[str, ...]:
    """Keys of a shard. Two shards hold the same documents if they share a key."""
    name = _SUFFIX.sub("", shard)
    return (name,) if shard.startswith("hf://") else (name, os.path.realpath(shard))


def _refuse_twice(spec: str, shards: Iterable[str]) -> None:
    """Raise UserError if two `shards` hold the same documents: one is compressed or a link."""
    seen: dict[str, str] = {}
    for shard in shards:
        for same in _same(shard):
            if seen.setdefault(same, shard) != shard:
                both = f"{seen[same]} and {shard} hold the same documents"
                raise UserError(f"{spec}: {both}; remove one of them, or give a glob that leaves it out")


def _shards_under(folder: str) -> list[str]:
    """All shards below `folder`, except in hidden files and folders, which hold caches and unfinished downloads."""
    inside = glob.iglob(os.path.join(glob.escape(folder), "**", "*"), recursive=True)
    return [path for path in inside if path.endswith(SUFFIXES) and os.path.isfile(path)]


def _local_corpus(spec: str, found: Iterable[str]) -> Corpus:
    shards = tuple(sorted({os.path.abspath(shard) for shard in found}))
    sizes = [os.path.getsize(shard) for shard in shards]
    if not shards:
        raise UserError(f"{spec}: no shards here; a corpus is made of {' / '.join(SUFFIXES)} files")
    _refuse_twice(spec, shards)
    if not any(sizes):
        raise UserError(f"{spec}: an empty corpus, every shard has zero bytes")
    root = os.path.commonpath([os.path.dirname(shard) for shard in shards])
    listing = [[os.path.relpath(shard, root), size] for shard, size in zip(shards, sizes, strict=True)]
    return Corpus(spec, None, shards, hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16])


def _hub_corpus(spec: str, split: Split, revision: str | None) -> Corpus:
    api = HfApi()
    try:
        commit = api.dataset_info(spec, revision=revision).sha
        names = api.list_repo_files(spec, repo_type="dataset", revision=commit)
    except RevisionNotFoundError as error:
        raise UserError(f"{spec}: this Hugging Face dataset has no revision {revision}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:  # a gated dataset counts as not found
        raise UserError(
            f"{spec}: neither a folder here nor a dataset that the Hugging Face hub shows you; check the path, or "
            "set HF_TOKEN if it is gated"
        ) from error
    except READ_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{spec}: no such folder here, and the Hugging Face hub could not be asked for a dataset of that name "
            f"({reason})"
        ) from error
    names = narrow_to_split(spec, [name for name in names if name.endswith(SUFFIXES)], split, folder=None)
    if commit is None or not names:
        raise UserError(
            f"{spec}: no shards in this Hugging Face dataset; a corpus is made of {' / '.join(SUFFIXES)} files"
        )
    shards = tuple(sorted(f"hf://datasets/{spec}@{commit}/{name}" for name in names))
    _refuse_twice(spec, shards)
    return Corpus(spec, commit, shards, commit)

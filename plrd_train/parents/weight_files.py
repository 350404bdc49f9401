"""The safetensors files of a folder: which tensors they hold, by their headers."""

import json
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

from plrd_train.errors import UserError
from plrd_train.parents.messages import first_line
from plrd_train.parents.modeling_plrd import VARIANT

# transformers looks for a single file first, then for an index.
_WEIGHT_FILES = ("model.safetensors", f"model.{VARIANT}.safetensors")
INDEX_FILES = ("model.safetensors.index.json", f"model.safetensors.index.{VARIANT}.json")
# `equal_tensors` compares this many rows at a time.
_ROWS = 4096


def weight_map(folder: Path, path: str) -> dict[str, str]:
    """Map each tensor name to its file name, from the headers of the safetensors files in `folder`.

    `path` is the parent as the user gave it, for messages. Raises UserError if a file is missing, damaged or outside
    the folder, and if the index disagrees with the headers.
    """
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return dict.fromkeys(_tensor_names(folder / name), name)
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return _read_index(folder / name)
    if any(folder.glob("*.bin")):
        convert = f"AutoModelForCausalLM.from_pretrained({path!r}).save_pretrained(FOLDER)"
        raise UserError(
            f"parent {path}: has only .bin weights; convert them once with transformers: {convert}, and copy the "
            "tokenizer's files"
        )
    raise UserError(f"parent {path}: has no model.safetensors and no {INDEX_FILES[0]}")


def _read_index(index: Path) -> dict[str, str]:
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weights.values()))
        outside = [name for name in shards if not _lies_inside(index.parent, name)]
        missing = [name for name in shards if not (index.parent / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise UserError(f'{index}: needs "weight_map": {{tensor name: file name}}; fetch it again') from None
    if outside:
        raise UserError(f"{index}: names {outside[0]}, a file outside its folder")
    if missing:
        raise UserError(f"{index}: names {missing[0]}, which is missing; fetch it again")
    held = {name: set(_tensor_names(index.parent / name)) for name in shards}
    for tensor, name in weights.items():
        if tensor not in held[name]:
            raise UserError(f"{index}: says that {name} holds {tensor}, which it does not; fetch both again")
    return weights


def _lies_inside(folder: Path, name: str) -> bool:
    """Whether the file `name` is inside `folder` after links are resolved.

    A snapshot in the hub's cache links to files in `blobs`, beside `snapshots`; those count as inside.
    """
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return False
    folder = folder.resolve()
    blobs = [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
    return any((folder / name).resolve().is_relative_to(place) for place in (folder, *blobs))


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or not safetensors ({first_line(error)}); fetch it again") from None


def equal_tensors(file: Path, name: str, other_file: Path, other: str) -> bool:
    """Whether the tensor `name` of `file` equals the tensor `other` of `other_file` in shape and every value."""
    with safe_open(file, framework="pt") as one, safe_open(other_file, framework="pt") as two:
        a, b = one.get_slice(name), two.get_slice(other)
        if a.get_shape() != b.get_shape():
            return False
        return all(torch.equal(a[i : i + _ROWS], b[i : i + _ROWS]) for i in range(0, a.get_shape()[0], _ROWS))

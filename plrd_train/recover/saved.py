"""The tensors of a checkpoint as safetensors files, without pickle, for any number of ranks; and their checksums."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plrd_train.errors import UserError
from plrd_train.runtime.world import SharedError, World

SUMS = "sha256sums"  # in the format of sha256sum, so that `sha256sum --check sha256sums` finds damaged files


def write(state: Mapping[str, Tensor], folder: Path, world: World) -> None:
    """Write the DTensors `state` into `folder`; each rank writes its shards. A collective. Raises SharedError if a file
    cannot be written."""
    # The Hugging Face writer stores safetensors and no pickle.
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(state), storage_writer=writer, process_group=world.group)
    except dcp.CheckpointException as error:  # on every rank alike
        first = next(iter(error.failures.values()))[0]
        if not isinstance(first, OSError):
            raise
        raise SharedError(
            f"{folder}: this checkpoint cannot be written ({first}); make room, and the same command goes on"
        ) from None


def read(state: Mapping[str, Tensor], folder: Path) -> None:
    """Fill the DTensors `state` in place from the files that `write` made in `folder`. They may be of another mesh, and
    fewer than were written. A collective. Raises SharedError if the folder holds other tensors, or no safetensors."""
    for file in sorted(folder.glob("*.safetensors")):  # of which torch would log a traceback
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise SharedError(f"{file}: not safetensors ({error}); use another run_dir") from None
    try:
        dcp.load(dict(state), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    # Raised on every rank alike; AssertionError if no file could be opened.
    except (dcp.CheckpointException, AssertionError) as error:
        first = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        said = str(first).strip().splitlines()
        raise SharedError(
            f"{folder}: not a checkpoint of this run ({said[0] if said else type(first).__name__}); use another run_dir"
        ) from None


def checksums(folder: Path, world: World) -> dict[str, str]:
    """{file: SHA-256} of the files of `folder`, SUMS excepted. Each is computed on one rank. A collective."""
    names = world.on_main(lambda: sorted(path.name for path in folder.iterdir() if path.name != SUMS))
    own = world.on_all(lambda: {name: _sha256(folder / name) for name in names[world.rank :: world.size]})
    return dict(sorted(item for part in world.share(own) for item in part.items()))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def damage(folder: Path, world: World) -> str | None:
    """A line that names a damaged file of `folder`; None if all checksums agree. A collective."""
    try:
        lines = world.on_main(
            lambda: (folder / SUMS).read_text(errors="replace").splitlines() if (folder / SUMS).is_file() else []
        )
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        found = checksums(folder, world)
    except UserError as error:
        return str(error)
    if not expected or "" in expected:  # a line was cut short
        return f"{folder / SUMS} is missing or damaged"
    for name in sorted({*expected, *found}):
        if name not in found:
            return f"{folder / name} is missing"
        if found[name] != expected.get(name):
            return f"{folder / name} is not what was written"
    return None


def format_checksums(sums: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())

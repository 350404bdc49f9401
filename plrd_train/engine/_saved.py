"""The model of a checkpoint in files: sharded tensors as safetensors without any pickle, read back on any number of ranks."""

from collections.abc import Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plrd_train.errors import UserError
from plrd_train.world import SharedError


def write(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the DTensors `state` into `folder`, each rank its shards. A collective. Raises SharedError where a file cannot be written."""
    # The Hugging Face writer stores safetensors and no pickle.
    try:
        dcp.save(dict(state), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.CheckpointException as error:  # on every rank alike
        first = next(iter(error.failures.values()))[0]
        if not isinstance(first, OSError):
            raise
        raise SharedError(f"{folder}: this checkpoint cannot be written ({first}); make room, and the same command goes on") from None


def check(folder: Path) -> None:
    """Raise UserError where a file of `folder` is damaged. Not a collective."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"{file}: this checkpoint cannot be read ({error}); restore it, or remove the folder of its stage to begin again"
            ) from None


def read(state: Mapping[str, Tensor], folder: Path) -> None:
    """Fill the DTensors `state`, of any mesh, in place from what `write` left in `folder`. A collective."""
    dcp.load(dict(state), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))

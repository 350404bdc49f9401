"""Finished factors of a stage that is being factored, on disk until the stage has a checkpoint: a restart does not factor them again."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class KeptFactors:
    """The protocol `plrd_train.lowrank.owned.Kept` over a folder that all ranks see, one safetensors file a Linear, made visible when it is
    whole. What is read lies on `device`."""

    def __init__(self, folder: Path, device: torch.device):
        self._folder, self._device = folder, device

    def get(self, name: str, key: str) -> dict[str, Tensor] | None:
        try:
            with safe_open(self._path(name), framework="pt", device=str(self._device)) as file:
                return {part: file.get_tensor(part) for part in file.keys()} if file.metadata().get("key") == key else None  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):  # of a damaged one nothing is lost but time
            return None

    def put(self, name: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        part = path.with_suffix(".part")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"key": key})
        except SafetensorError as error:
            raise OSError(f"{part}: {error}") from None
        os.replace(part, path)

    def clear(self) -> None:
        """Remove them all. Once, on one rank."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

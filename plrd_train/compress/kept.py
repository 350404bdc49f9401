"""Finished factors of a stage that is being factored, on disk until the stage has a checkpoint: a restart does not
factor them again."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plrd_train.runtime.files import save_tensors


class KeptFactors:
    """A `plrd_train.compress.contracts.Cache` in a folder that all ranks see. Each entry is a safetensors file, which
    is made visible when it is complete. Tensors are loaded to `device`."""

    def __init__(self, folder: Path, device: torch.device):
        self._folder, self._device = folder, device

    def get(self, name: str, key: str) -> dict[str, Tensor] | None:
        try:
            with safe_open(self._path(name), framework="pt") as file:
                found, tensors = file.metadata() or {}, {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):  # of a damaged one nothing is lost but time
            return None
        if (found.get("key"), found.get("sha256")) != (key, _sha256(tensors)):
            return None
        return {part: tensor.to(self._device) for part, tensor in tensors.items()}

    def put(self, name: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        path = self._path(name)
        part = path.with_suffix(".part")
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_tensors(whole, part, metadata={"key": key, "sha256": _sha256(whole)})
            part.replace(path)
        except OSError as error:
            why = error.strerror
            raise OSError(f"{part}: this cannot be written ({why}); mend that, and the same command goes on") from None

    def clear(self) -> None:
        """Remove them all. Once, on one rank."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of the names and the bytes of these tensors, in host memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

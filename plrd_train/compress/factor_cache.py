"""Factors of a stage in progress, on disk until the stage has a checkpoint: a restart does not compute them again."""

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plrd_train.compress.algebra.gram import ROWS, Factors
from plrd_train.compress.methods import Method
from plrd_train.runtime.files import save_tensors


class FactorCache:
    """A `plrd_train.compress.contracts.Cache` in a folder that all ranks see. Each entry is a safetensors file, which
    is made visible when it is complete. Tensors are loaded to `device`."""

    def __init__(self, folder: Path, device: torch.device):
        self._folder, self._device = folder, device

    def get(self, name: str, key: str) -> dict[str, Tensor] | None:
        try:
            with safe_open(self._path(name), framework="pt") as file:
                found, tensors = file.metadata() or {}, {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):  # a damaged file costs nothing but time
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
        """Remove all entries. To be called on one rank."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names and bytes of these tensors, which are in host memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest(text: str, tensors: Iterable[Tensor]) -> str:
    """The key of factors: a SHA-256 of what they depend on, a text and the row and column sums of tensors."""
    found = hashlib.sha256(text.encode())
    for tensor in tensors:
        parts = tensor.split(ROWS)  # each part becomes a float64 copy
        sums = (
            torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0),
            *(part.reshape(len(part), -1).sum(1, dtype=torch.float64) for part in parts),
        )
        for one in sums:
            found.update(one.cpu().numpy().tobytes())
    return found.hexdigest()


def identity(method: Method) -> str:
    """The method and its settings, as a text."""
    return f"{type(method).__module__} {method!r}"


def as_tensors(factors: Factors) -> dict[str, Tensor]:
    """Factors as a cache stores them."""
    errors = [factors.rel_error, torch.nan if factors.metric_error is None else factors.metric_error]
    return {"up": factors.up, "down": factors.down, "errors": torch.tensor(errors, dtype=torch.float64)}


def as_factors(tensors: Mapping[str, Tensor]) -> Factors:
    """The factors again."""
    rel_error, metric_error = tensors["errors"].tolist()
    return Factors(tensors["up"], tensors["down"], rel_error, None if metric_error != metric_error else metric_error)

"""One Linear on the rank that owns it: decomposed at most once, cut at any rank, and not even that where what is asked
for was kept."""

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from plrd_train.compress.algebra.factors import ROWS, Factors
from plrd_train.compress.algebra.truncate import Spectral
from plrd_train.compress.contracts import Cache
from plrd_train.compress.methods import Factorizer


class Weight:
    """A Linear on its owner, decomposed when that is first needed: never, where all that is asked for was kept."""

    def __init__(
        self, name: str, parts: list[Tensor], statistic: Tensor | None, factorizer: Factorizer, kept: Cache | None
    ):
        self._name, self._parts, self._statistic, self._factorizer, self._kept = (
            name,
            parts,
            statistic,
            factorizer,
            kept,
        )
        self._made: Spectral | None = None
        self._key = ""
        if kept is not None:
            self._key = fingerprint(method_of(factorizer), parts if statistic is None else [*parts, statistic])

    def values(self) -> Tensor:
        """Its singular values in the metrics (`Spectral.values`)."""
        return self._keep("values", lambda: {"values": self.decomposed().values})["values"]

    def cut(self, rank: int, device: torch.device | None = None) -> Factors:
        """Its factors at that rank, which are kept."""
        return unpacked(self._keep(f"rank-{rank}", lambda: packed(self.decomposed(device).cut(rank))))

    def decomposed(self, device: torch.device | None = None) -> Spectral:
        """On `device`; None: where it is."""
        if self._made is None:
            parts = self._parts if device is None else [part.to(device) for part in self._parts]
            dense, statistic = len(parts) == 1, self._statistic
            self._made = (
                self._factorizer.dense(parts[0], statistic)
                if dense
                else self._factorizer.product(parts[0], parts[1], statistic)
            )
            self._parts, self._statistic = [], None
        return self._made if device is None else self._made.to(device)

    def rest(self) -> None:
        """Move to host memory."""
        host = torch.device("cpu")
        if self._made is not None:
            self._made = self._made.to(host)
        self._parts = [part.to(host) for part in self._parts]

    def _keep(self, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self._kept is None:
            return make()
        name = f"{self._name}.{what}"
        made = self._kept.get(name, self._key)
        if made is None:
            made = make()
            self._kept.put(name, self._key, made)
        return made


def fingerprint(said: str, tensors: Iterable[Tensor]) -> str:
    """A digest of what factors follow from: of text, and of tensors by their row and column sums."""
    digest = hashlib.sha256(said.encode())
    for tensor in tensors:
        # A few rows at a time, as each part becomes a float64 copy.
        parts = tensor.split(ROWS)
        sums = (
            torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0),
            *(part.reshape(len(part), -1).sum(1, dtype=torch.float64) for part in parts),
        )
        for one in sums:
            digest.update(one.cpu().numpy().tobytes())
    return digest.hexdigest()


def method_of(factorizer: Factorizer) -> str:
    """The method with its settings."""
    return f"{type(factorizer).__module__} {factorizer!r}"


def packed(factors: Factors) -> dict[str, Tensor]:
    """As `Cache` takes them."""
    errors = [factors.rel_error, torch.nan if factors.metric_error is None else factors.metric_error]
    return {"up": factors.up, "down": factors.down, "errors": torch.tensor(errors, dtype=torch.float64)}


def unpacked(tensors: Mapping[str, Tensor]) -> Factors:
    rel_error, metric_error = tensors["errors"].tolist()
    return Factors(tensors["up"], tensors["down"], rel_error, None if metric_error != metric_error else metric_error)

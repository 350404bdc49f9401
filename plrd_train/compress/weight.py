"""The weight of one Linear on the rank that owns it. It is decomposed at most once, and cut at any number of ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from plrd_train.compress.algebra.gram import Factors
from plrd_train.compress.algebra.truncate import Spectral
from plrd_train.compress.contracts import Cache
from plrd_train.compress.factor_cache import as_factors, as_tensors, digest, identity
from plrd_train.compress.methods import Method


class Weight:
    """A weight that is decomposed when that is first needed, and never where the cache has all results.

    `parts` are the dense weight (out, in), or the factors (out, k) and (k, in); they are released once decomposed.
    """

    def __init__(self, name: str, parts: list[Tensor], statistic: Tensor | None, method: Method, cache: Cache | None):
        self._name, self._parts, self._statistic = name, parts, statistic
        self._method, self._cache = method, cache
        self._spectral: Spectral | None = None
        self._key = ""
        if cache is not None:
            self._key = digest(identity(method), parts if statistic is None else [*parts, statistic])

    def values(self) -> Tensor:
        """Its singular values in the metrics (`Spectral.values`), (k,) float64."""
        return self._cached("values", lambda: {"values": self.decomposed().values})["values"]

    def cut(self, rank: int, device: torch.device | None = None) -> Factors:
        """Its factors at that rank; `device` as for `decomposed`."""
        return as_factors(self._cached(f"rank-{rank}", lambda: as_tensors(self.decomposed(device).cut(rank))))

    def decomposed(self, device: torch.device | None = None) -> Spectral:
        """Its decomposition, on `device`; None: on the device where it is."""
        if self._spectral is None:
            parts = self._parts if device is None else [part.to(device) for part in self._parts]
            self._spectral = (
                self._method.dense(parts[0], self._statistic)
                if len(parts) == 1
                else self._method.product(parts[0], parts[1], self._statistic)
            )
            self._parts, self._statistic = [], None
        return self._spectral if device is None else self._spectral.to(device)

    def to_host(self) -> None:
        """Move to host memory."""
        host = torch.device("cpu")
        if self._spectral is not None:
            self._spectral = self._spectral.to(host)
        self._parts = [part.to(host) for part in self._parts]

    def _cached(self, what: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self._cache is None:
            return compute()
        entry = f"{self._name}.{what}"
        found = self._cache.get(entry, self._key)
        if found is None:
            found = compute()
            self._cache.put(entry, self._key, found)
        return found

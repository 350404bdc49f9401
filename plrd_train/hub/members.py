"""Publishing a model as a Hugging Face folder, all at once or not at all."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from plrd_train.engine import Engine
from plrd_train.errors import UserError
from plrd_train.hub.modeling_plrd import VARIANT, with_ranks
from plrd_train.hub.models import build_model
from plrd_train.hub.parents import TOKENIZER_CODE, TOKENIZER_FILES, Parent


def write_member(
    folder: Path,
    *,
    config: PreTrainedConfig,
    ranks: Mapping[str, int],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    parent: Parent,
    card: str,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write the model of `config` with `ranks` to `folder`: config.json, safetensors of `dtype`, the parent's tokenizer, README.md from `card`.

    `tensors` gives (parameter name, full tensor) one by one, on any device and in any order; at most one shard is held in memory. Tied weights may
    come under one of their names or both. With no ranks the folder is a plain one of the architecture itself. `folder` appears complete or not at
    all; what a killed run left of it is replaced. Raises UserError where `folder` exists or a tensor is not finite in `dtype`, ValueError where
    `tensors` are not exactly those of the model.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists already, and a published member is never overwritten; remove it or choose another name")
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        config = with_ranks(config, ranks)
        config.dtype = dtype
        config.save_pretrained(draft)
        for pattern in (*TOKENIZER_FILES, TOKENIZER_CODE, "generation_config.json"):
            for file in Path(parent.folder).glob(pattern):
                shutil.copyfile(file, draft / file.name)
        (draft / "README.md").write_text(card, encoding="utf-8")
        shards = _ShardWriter(draft, VARIANT if ranks else None, max_shard_bytes)
        for name, tensor in _complete(config, tensors):
            tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
            if not torch.isfinite(tensor).all():
                raise UserError(f"{folder}: {name} is not finite in {dtype}, so nothing was published; train in a wider dtype or with a smaller rate")
            shards.add(name, tensor)
        shards.close()
        for path in (*draft.iterdir(), draft):
            _fsync(path)
        draft.rename(folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def publish(engine: Engine, folder: Path, **settings: Any) -> None:
    """Write the model in `engine` to `folder` on rank 0, by `write_member` with these `settings`. A collective."""
    tensors = engine.tensors()
    if engine.rank == 0:
        write_member(folder, tensors=((name, whole) for name, whole in tensors if whole is not None), **settings)
    else:
        for _ in tensors:  # gathering is collective
            pass


def _complete(config: PreTrainedConfig, tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Pass `tensors` on, each tied one once. Raises ValueError where they are not those of the model: loading would fill a hole at random."""
    with torch.device("meta"):
        model = build_model(config)
    first_name = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    canonical = {name: first_name[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given = set()
    for name, tensor in tensors:
        if tensor.shape != shapes.get(name):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {type(model).__name__} expects {shapes.get(name, 'no such tensor')}")
        if canonical[name] not in given:
            given.add(canonical[name])
            yield canonical[name], tensor
    if missing := set(canonical.values()) - given:
        raise ValueError(f"{len(missing)} tensors of {type(model).__name__} were not given, among them {min(missing)}")


class _ShardWriter:
    """Tensors into safetensors files of at most `max_bytes` each (one tensor may exceed it), under the names that transformers looks for."""

    def __init__(self, folder: Path, variant: str | None, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._stem = f"model.{variant}" if variant else "model"
        self._index = f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._total_bytes = 0
        self._written: list[list[str]] = []  # tensor names of each file

    def add(self, name: str, tensor: Tensor) -> None:
        if self._shard and self._shard_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self._shard[name] = tensor
        self._shard_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write the last shard and, now that their number is known, name them all; more than one get an index."""
        self._flush()
        count = len(self._written)
        names = [f"{self._stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [f"{self._stem}.safetensors"]
        for i, name in enumerate(names):
            self._draft(i).rename(self._folder / name)
        if count > 1:
            weight_map = {tensor: name for name, tensors in zip(names, self._written, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self._folder / self._index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        path = self._draft(len(self._written))
        try:
            save_file(self._shard, path, metadata={"format": "pt"})
        except SafetensorError as error:
            if not (number := re.search(r"os error (\d+)", str(error))):
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(path)) from None
        self._written.append(list(self._shard))
        self._shard.clear()
        self._shard_bytes = 0

    def _draft(self, i: int) -> Path:
        return self._folder / f"{i}.safetensors"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

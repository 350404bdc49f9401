"""Write a model as a Hugging Face folder, atomically."""

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from plrd_train.compress import forms
from plrd_train.engine import Engine
from plrd_train.errors import UserError
from plrd_train.parents.modeling_plrd import VARIANT, with_ranks
from plrd_train.parents.models import build_model
from plrd_train.parents.parent import Parent
from plrd_train.parents.tokenization import copy_tokenizer
from plrd_train.runtime.files import naming, save_tensors, sync, write_atomically


class MemberWriter:
    """Writes a Hugging Face folder tensor by tensor: config.json, safetensors of `dtype`, the parent's tokenizer, and
    the card.

    The model is that of `config` with `ranks`, given as pairs of factors that the `form` has packed, and stored in it;
    with none the folder is a plain one of the architecture itself. `folder` appears when `commit` is called, complete;
    until then the files are in `draft`, which `close` removes. A draft that a killed run left is replaced. At
    most one shard of `max_shard_bytes` is held in memory. Raises UserError where `folder` exists.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: PreTrainedConfig,
        ranks: Mapping[str, int],
        form: str = "lowrank",
        dtype: torch.dtype,
        parent: Parent,
        max_shard_bytes: int = 5 * 2**30,
    ):
        self.folder = folder = Path(folder)
        if folder.exists():
            raise UserError(
                f"{folder}: exists already, and a published member is never overwritten; remove it or choose another "
                "name"
            )
        published = with_ranks(config, ranks, form)
        published.dtype = dtype
        self.draft, self._dtype = folder.with_name(f".{folder.name}.part"), dtype
        with torch.device("meta"):
            model = build_model(config, ranks)
        self._low_rank, self._form = frozenset(ranks), forms.get(form)
        self._architecture = type(model).__name__
        first_name = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
        self._canonical = {name: first_name[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._given: set[str] = set()
        self.close()
        self.draft.mkdir(parents=True)
        try:
            with naming(self.draft):
                published.save_pretrained(self.draft)
                copy_tokenizer(Path(parent.folder), self.draft, as_stored=parent.tokenizer_as_stored)
                for file in Path(parent.folder).glob("generation_config.json"):
                    shutil.copyfile(file, self.draft / file.name)
        except BaseException:
            self.close()
            raise
        self._shards = _ShardWriter(self.draft, VARIANT if ranks else None, max_shard_bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one whole tensor, on any device, in any order; of tied ones the first that comes. Raises UserError
        where it is not finite in the dtype, ValueError where it is none of the model's."""
        if tensor.shape != self._shapes.get(name):
            expected = self._shapes.get(name, "no such tensor")
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {self._architecture} expects {expected}")
        name = self._canonical[name]
        if name in self._given:
            return
        self._given.add(name)
        tensor = (
            tensor.detach()
            .to("cpu", self._dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            .contiguous()
        )
        if not torch.isfinite(tensor).all():
            mend = "train in a wider dtype or with a smaller rate"
            raise UserError(f"{self.folder}: {name} is not finite in {self._dtype}, so nothing was published; {mend}")
        pair = forms.split(name, self._low_rank)
        stored = {name: tensor}
        if pair is not None:
            stored = {f"{pair[0]}.{leaf}": part for leaf, part in self._form.stored(pair[1], tensor).items()}
        for leaf, part in stored.items():
            self._shards.add(leaf, part.contiguous())

    def missing(self) -> list[str]:
        """The names that were not given yet, each tied one once."""
        return [name for name in dict.fromkeys(self._canonical.values()) if name not in self._given]

    def finish(self) -> None:
        """Close the weights, after which `draft` can be loaded. Raises ValueError where a tensor was not given:
        transformers would fill it at random."""
        if missing := self.missing():
            raise ValueError(
                f"{len(missing)} tensors of {self._architecture} were not given, among them {min(missing)}"
            )
        self._shards.close()

    def commit(self, card: str) -> None:
        """Add README.md from `card`, and rename the draft to `folder`."""
        write_atomically(self.draft / "README.md", card)
        for path in (*self.draft.iterdir(), self.draft):
            sync(path)
        self.draft.rename(self.folder)
        sync(self.folder.parent)

    def close(self) -> None:
        """Remove what was not published."""
        shutil.rmtree(self.draft, ignore_errors=True)


def write_member(folder: Path, *, tensors: Iterable[tuple[str, Tensor]], card: str, **settings: Any) -> None:
    """Write a model to `folder`, atomically, from its `tensors`, (parameter name, full tensor) one by one; `settings`
    are those of `MemberWriter`. Raises what that raises, and ValueError where `tensors` are not exactly the model's."""
    with closing(MemberWriter(folder, **settings)) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.finish()
        writer.commit(card)


def write_model(engine: Engine, folder: Path, **settings: Any) -> None:
    """Write the model in `engine` to `folder` on rank 0, by `write_member` with these `settings`. A collective."""
    tensors = engine.tensors()
    if engine.rank == 0:
        write_member(folder, tensors=((name, whole) for name, whole in tensors if whole is not None), **settings)
    else:
        for _ in tensors:  # gathering is collective
            pass


class _ShardWriter:
    """Tensors into safetensors files of at most `max_bytes` each (one tensor may exceed it), under the names that
    transformers looks for."""

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
        names = (
            [f"{self._stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
            if count > 1
            else [f"{self._stem}.safetensors"]
        )
        for i, name in enumerate(names):
            self._draft(i).rename(self._folder / name)
        if count > 1:
            weight_map = {
                tensor: name for name, tensors in zip(names, self._written, strict=True) for tensor in tensors
            }
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_atomically(self._folder / self._index, json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        save_tensors(self._shard, self._draft(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._shard))
        self._shard.clear()
        self._shard_bytes = 0

    def _draft(self, i: int) -> Path:
        return self._folder / f"{i}.safetensors"

"""Read a parent's weights a few rows at a time, so that a rank holds no more than its own share."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from plrd_train.compress import forms
from plrd_train.errors import UserError
from plrd_train.parents.modeling_plrd import model_form, model_ranks
from plrd_train.parents.models import published_model
from plrd_train.parents.names import match
from plrd_train.parents.parent import Parent, load_config

# Every other dtype (float8, integers) needs scales or tables from other tensors.
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class WeightReader:
    """Reads a parent's tensors by their names in the model, in their stored dtype.

    Names are matched as transformers matches them: files may hold GPT-NeoX's `lm_head.weight` as `embed_out.weight`, or
    omit the prefix `model.`. A tied weight is stored under one name and found under each. The low-rank Linears of a
    member are read as pairs of factors, up.weight and down.weight, whatever their form.

    The constructor reads headers only. It raises UserError if a stored shape is not that of the config, or if a
    parameter is not stored as floating-point numbers.
    """

    def __init__(self, parent: Parent):
        self._parent = parent
        self._open: dict[Path, safe_open] = {}
        config = load_config(parent)
        self._low_rank, self._form = model_ranks(config), forms.get(model_form(config))
        with torch.device("meta"):
            model = published_model(config)
        names = match(model, parent.weights)
        self._stored, self._converted = names.taken, names.converted
        owner = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items() if name in self._stored}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in self._stored and id(tensor) in owner:
                self._stored[name] = self._stored[owner[id(tensor)]]
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._check({name: tensor.shape for name, tensor in model.state_dict().items()})

    def names(self) -> list[str]:
        """The names in the model of the stored tensors."""
        return list(self._stored)

    def shape(self, name: str) -> torch.Size:
        if self._part_of_pair(name):
            return self.read(name).shape
        file, stored = self._find(name)
        return torch.Size(self._handle(file).get_slice(stored).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of the tensor `name`, which must be one of `names()`."""
        file, stored = self._find(name)
        return _dtype(self._handle(file), stored)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read the tensor `name`, or only `rows` of its first dimension.

        Raises UserError if the parent has no such tensor, or if a value is NaN or infinite.
        """
        if pair := self._part_of_pair(name):
            linear, part = pair
            tensor = self._form.loaded(part, lambda leaf: self.read(f"{linear}.{leaf}"))
            return tensor if rows is None else tensor[rows]
        file, stored = self._find(name)
        handle = self._handle(file)
        tensor = handle.get_tensor(stored) if rows is None else handle.get_slice(stored)[rows]
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {stored} holds NaN or infinity; fetch the file again, or choose another parent")
        return tensor

    def _check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise UserError if a stored shape is not that in `shapes`, or if a parameter is not floating-point."""
        for name in self._stored:
            file, stored = self._find(name)
            if self.shape(name) != shapes[name]:
                mismatch = (
                    f"{stored} has shape {tuple(self.shape(name))}, but config.json asks for {tuple(shapes[name])}"
                )
                raise UserError(f"{file}: {mismatch}; they are not of one model, fetch both again")
            if name in self._parameters and self.dtype(name) not in _DTYPES:
                raise UserError(
                    f"{file}: {stored} is stored as {str(self.dtype(name)).removeprefix('torch.')}; give the "
                    "unquantized model"
                )

    def _part_of_pair(self, name: str) -> tuple[str, str] | None:
        """(Linear, factor) if `name` is a factor of a Linear that is stored in another form; otherwise None."""
        return None if name in self._stored else forms.split(name, self._low_rank)

    def _find(self, name: str) -> tuple[Path, str]:
        """(file, name in that file) of a tensor of the model. Raises UserError if it is not stored."""
        if name in self._converted:
            mend = "load it with transformers and save it with save_pretrained(FOLDER, save_original_format=False)"
            raise UserError(
                f"parent {self._parent.path}: {self._converted[name]} is stored in a form that must be converted; "
                f"{mend}"
            )
        if name not in self._stored:
            raise UserError(
                f"parent {self._parent.path}: its weights lack {name}, which config.json requires; fetch it again"
            )
        stored = self._stored[name]
        return Path(self._parent.folder) / self._parent.weights[stored], stored

    def _handle(self, file: Path) -> safe_open:
        """Open a file once; it stays memory-mapped until the reader is dropped."""
        if file not in self._open:
            if not file.is_file():
                raise UserError(
                    f"{file}: not on this machine; every node needs the parent, on a shared disk or in a cache of "
                    "its own (HF_HOME)"
                )
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]


def parent_dtype(parent: Parent) -> torch.dtype:
    """The floating dtype of most of a parent's elements."""
    counts = Counter[torch.dtype]()
    for file in set(parent.weights.values()):
        with safe_open(Path(parent.folder) / file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118, a safe_open is no dict
                counts[_dtype(handle, name)] += torch.Size(handle.get_slice(name).get_shape()).numel()
    return max((dtype for dtype in counts if dtype.is_floating_point), key=counts.__getitem__)


def _dtype(handle: safe_open, name: str) -> torch.dtype:
    tensor = handle.get_slice(name)
    return (tensor[:0] if tensor.get_shape() else handle.get_tensor(name)).dtype

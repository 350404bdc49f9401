"""Match the tensor names of a checkpoint with those of a model, by transformers' own rules."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from plrd_train.compress.blocks import blocks_of

_SHOWN = 4


@dataclass(frozen=True)
class Names:
    """The name in the model of each tensor in the files.

    taken: {name in the model: name in the files} of the tensors that are used unchanged.
    converted: the same, for tensors that must be converted first.
    left_out: {name in the files: name after transformers' renaming rules} of the tensors that the model does not have.
    """

    taken: dict[str, str]
    converted: dict[str, str]
    left_out: dict[str, str]


def match(model: PreTrainedModel, stored: Iterable[str]) -> Names:
    """Match the tensor names `stored` in files with those of `model`, as its from_pretrained does."""
    rules, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    names = Names({}, {}, {})
    for key in sorted(stored, key=dot_natural_key):
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, converter = key, None
        if name not in state:
            names.left_out[key] = name
        else:
            (names.taken if converter is None else names.converted)[name] = key
    return names


def altering_tensors(model: PreTrainedModel, names: Names) -> list[str]:
    """Stored tensors that are left out, but change the value of a weight in the same module.

    Examples are the scales of quantized weights, a bias that config.json does not have, and the factors of an adapter.
    """
    ignored = model._keys_to_ignore_on_load_unexpected
    known = re.compile("|".join(ignored)) if ignored else None
    found = []
    for key, name in names.left_out.items():
        inside = _deepest(model, name) or _deepest(model, f"{model.base_model_prefix}.{name}")
        has_weights = inside is not None and any(parameter is not None for parameter in inside._parameters.values())
        if has_weights and not (known and known.search(name)):
            found.append(key)
    return found


def left_out_notes(model: PreTrainedModel, names: Names) -> list[str]:
    """Lines for the user on the tensors that are left out.

    One line lists them all. Another names the layers beyond those that config.json counts.
    """
    if not names.left_out:
        return []
    lines = []
    blocks = list(blocks_of(model))
    where, count = blocks[0].rpartition(".")[0] if blocks else "", len(blocks)
    inside = {re.match(rf"{re.escape(where)}\.(\d+)\.", name) for name in names.left_out.values()} if blocks else set()
    beyond = {int(found[1]) for found in inside if found and int(found[1]) >= count}
    if beyond:
        lines.append(
            f"config.json counts {count} layers, the weights hold {max(beyond) + 1}: those from {where}.{count} on "
            "are left out"
        )
    what = (
        f"{len(names.left_out)} stored tensors are left out"
        if len(names.left_out) > 1
        else "1 stored tensor is left out"
    )
    lines.append(
        f"{what}, as transformers does, for which {type(model).__name__} has no place: "
        f"{name_patterns(list(names.left_out))}"
    )
    return lines


def name_patterns(names: Sequence[str]) -> str:
    """Summarise names as patterns: `*` replaces each number, and a count follows. At most four patterns are listed."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    shown = [f"{pattern} ({count})" if count > 1 else pattern for pattern, count in list(counts.items())[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(counts) - _SHOWN} more kinds" if len(counts) > _SHOWN else "")


def _deepest(model: nn.Module, name: str) -> nn.Module | None:
    """The innermost module of `model` on the path `name`; None if the path does not even begin in the model."""
    module, parts = model, name.split(".")
    for part in parts:
        child = module._modules.get(part)
        if child is None:
            break
        module = child
    return None if module is model else module

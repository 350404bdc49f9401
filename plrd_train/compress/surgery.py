"""The Linears of a model that may be factored, and their replacement by low-rank ones."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import nn

from plrd_train.compress.linear import LowRankLinear


def _embeddings(model: nn.Module) -> set[int]:
    """The ids of the input and output embeddings, which are never factored."""
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return {id(module) for get in getters if get is not None and (module := get()) is not None}


def eligible_linears(
    model: nn.Module, include: Sequence[str] = (".*",), exclude: Sequence[str] = (), fixed: Collection[str] = ()
) -> Iterator[tuple[str, nn.Linear | LowRankLinear]]:
    """Yield (name, module) of each Linear, dense or already low-rank, that may be factored, in the model's own order.

    `include` and `exclude` are regular expressions matched against the whole module name; a name that matches both is
    left out. The embeddings, the output projection (lm_head) and the Linears named in `fixed` are never eligible.
    """
    embeddings = _embeddings(model)
    chosen, refused = (re.compile("|".join(f"(?:{p})" for p in patterns) or r"(?!)") for patterns in (include, exclude))
    inside: list[str] = []  # the two factors of a LowRankLinear are Linears themselves, but not eligible on their own
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, LowRankLinear)) or id(module) in embeddings:
            continue
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, LowRankLinear):
            inside.append(name + ".")
        if name not in fixed and chosen.fullmatch(name) and not refused.fullmatch(name):
            yield name, module


def replace_linears(model: nn.Module, ranks: Mapping[str, int], make: Callable[..., nn.Module] = LowRankLinear) -> None:
    """Replace each Linear named in `ranks` by an uninitialised `make(in_features, out_features, rank, bias)`, on the
    Linear's device and in its dtype.

    Raises KeyError where a name is that of no Linear of `model`.
    """
    for name, rank in ranks.items():
        parent_name, _, leaf = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            old = getattr(parent, leaf)
        except AttributeError:
            raise KeyError(f"{name} is no module of this {type(model).__name__}") from None
        if not isinstance(old, (nn.Linear, LowRankLinear)):
            raise KeyError(f"{name} is a {type(old).__name__}, not a Linear")
        weight, bias = (old.up.weight, old.up.bias) if isinstance(old, LowRankLinear) else (old.weight, old.bias)
        new = make(old.in_features, old.out_features, rank, bias is not None)
        setattr(parent, leaf, new.to(device=weight.device, dtype=weight.dtype))

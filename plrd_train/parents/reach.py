"""What can be done with a parent: which Linears can be factored, by which methods, and its longest sequence."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from plrd_train.compress.blocks import blocks_of
from plrd_train.compress.ranks import Shape
from plrd_train.compress.surgery import eligible_linears
from plrd_train.errors import UserError
from plrd_train.parents.models import build_model, probe_of
from plrd_train.parents.names import name_patterns

# A note is given if more than this share of the matrices in the blocks cannot be factored.
_NOTED = 0.1


def shapes_of(
    model: nn.Module, config: PreTrainedConfig, include: Sequence[str], exclude: Sequence[str], path: str, form: str
) -> dict[str, Shape]:
    """{module name: shape} of the Linears of `model` that can be factored into `form`.

    `model` is built from `config`; `path` names the parent in messages. Raises UserError if there is no such Linear.
    """
    fixed = probe_of(config).fixed
    shapes = {name: Shape.of(linear, form) for name, linear in eligible_linears(model, include, exclude, fixed)}
    if shapes:
        return shapes
    if any(True for _ in eligible_linears(model, fixed=fixed)):
        raise UserError(f"linears: no Linear of {path} is left to factor; change linears.include and linears.exclude")
    kinds = {
        type(module).__name__
        for block in blocks_of(model).values()
        for module in block.modules()
        if _has_matrix(module)
    }
    held = f"; the weights of its blocks are in {', '.join(sorted(kinds))}" if kinds else ""
    raise UserError(
        f"parent {path}: {type(model).__name__} has no nn.Linear that can be factored{held}; choose another parent"
    )


def check_in_order(config: PreTrainedConfig, method: str, path: str) -> None:
    """Raise UserError if the blocks of this parent cannot be run one by one, as `method` requires."""
    if (why := probe_of(config).unchained) is not None:
        raise UserError(
            f"factorizer={method}: goes block by block, which {path} does not allow ({why}); choose svd, whitened, "
            "asvd or fisher"
        )


def most_tokens(config: PreTrainedConfig) -> int | None:
    """The number of tokens that a parent has position embeddings for; None if it computes positions."""
    return probe_of(config).positions


def check_lengths(config: PreTrainedConfig, lengths: Mapping[str, int], path: str) -> None:
    """Raise UserError if a sequence is longer than the table of position embeddings of the parent `path`.

    `lengths` is {config key: tokens of a sequence}.
    """
    most = most_tokens(config)
    if most is not None and (over := {key: tokens for key, tokens in lengths.items() if tokens > most}):
        given = ", ".join(f"{key}={tokens}" for key, tokens in over.items())
        raise UserError(
            f"{given}: {path} has position embeddings for {most} tokens; give "
            f"{' '.join(f'{key}={most}' for key in over)} or less"
        )


def notes(config: PreTrainedConfig, ratios: Iterable[float]) -> list[str]:
    """Lines for the user on what stays dense: Linears that cannot be replaced, and matrices that are not Linears.

    `ratios` are the compression ratios of the run. For each, the ratio of the whole model is given.
    """
    with torch.device("meta"):
        model = build_model(config)
    fixed = probe_of(config).fixed
    linears = dict(eligible_linears(model, fixed=fixed))
    lines = []
    outside = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    if left := [name for name, module in model.named_modules() if name in fixed and id(module) not in outside]:
        lines.append(f"Linears whose weights the model reads past their forward stay whole: {name_patterns(left)}")
    inside = tuple(f"{name}." for name in linears)
    matrices = {
        name: p.numel()
        for block, module in blocks_of(model).items()
        for name, p in module.named_parameters(prefix=block)
        if p.ndim > 1
    }
    others = {name: size for name, size in matrices.items() if not name.startswith(inside)}
    if sum(others.values()) > _NOTED * sum(matrices.values()):
        lines.append(_share(model, linears, others, ratios))
    return lines


def _share(
    model: nn.Module, linears: Mapping[str, nn.Module], others: Mapping[str, int], ratios: Iterable[float]
) -> str:
    shapes = [Shape.of(linear) for linear in linears.values()]  # type: ignore[arg-type]  # of eligible_linears
    total, now = sum(p.numel() for p in model.parameters()), sum(shape.params(shape.rank) for shape in shapes)
    dense = sum(shape.dense_params for shape in shapes)
    whole = [f"{total / (total - now + min(now, dense / ratio)):.3g}" for ratio in ratios if ratio > 1]
    asked = [f"{ratio:g}" for ratio in ratios if ratio > 1]
    becomes = f"; at {' / '.join(asked)}x on them the whole model becomes {' / '.join(whole)}x smaller" if asked else ""
    largest_first = sorted(others, key=others.__getitem__, reverse=True)
    held = f"the Linears that can be factored hold {now / total:.1%} of all parameters{becomes}"
    return f"{held}. These stay whole: {name_patterns(largest_first)}"


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.ndim > 1 for parameter in module._parameters.values())

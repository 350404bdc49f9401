"""The schema of conf/: it gathers the dataclasses that each component declares for its own settings, and checks a
resolved mapping against them before any work. They have no defaults: the defaults stand in conf/, once.

An unknown key, a wrong type and an impossible value each raise a UserError of one line that names the key. A new file
of a group whose files are components edits nothing here.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_type_hints

import pydantic
from pydantic import TypeAdapter, ValidationError

from plrd_train.compress.allocations import ALLOCATIONS
from plrd_train.compress.compressor import Compressor
from plrd_train.compress.forms import FORMS
from plrd_train.compress.methods import METHODS
from plrd_train.data.settings import Data
from plrd_train.engine import ENGINES
from plrd_train.errors import UserError
from plrd_train.evaluate import ALWAYS, EVALUATORS
from plrd_train.evaluate._settings import Evaluation
from plrd_train.parents.settings import Parent
from plrd_train.recover.objectives import OBJECTIVES
from plrd_train.recover.optimizers import OPTIMIZERS
from plrd_train.recover.schedules import SCHEDULES
from plrd_train.recover.settings import Checkpoint, Recover
from plrd_train.registry import Registry
from plrd_train.settings import STRICT, Count, section, whole
from plrd_train.stages.settings import Stages
from plrd_train.tracking.settings import Tracking


@section
class Linears:
    """Regular expressions over whole module names. Embeddings and lm_head stay whole in any case."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """One of a group's files, and its own settings (an instance of the dataclass that the file declares)."""

    name: str
    settings: Any


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment, complete. Its fields are the keys of conf/config.yaml."""

    experiment: str | None
    recipe: str
    run_dir: str
    seed: Count
    parent: Parent
    linears: Linears
    data: Data
    stages: Stages
    form: Chosen
    factorizer: Chosen
    ranks: Chosen
    recover: Recover
    schedule: Chosen
    optimizer: Chosen
    checkpoint: Checkpoint
    objective: Chosen
    engine: Chosen
    evaluation: Evaluation
    tracking: Tracking
    evaluators: dict[str, Any]  # no key: by name, the evaluators that `evaluation` has settings of

    def compressor(self) -> Compressor:
        """How the run compresses a model."""
        return Compressor(self.factorizer.settings, self.ranks.settings)

    def branches(self) -> bool:
        """Whether the member of some stage is trained on a branch of the trunk, and so is another model than that."""
        tokens = self.recover.global_batch_tokens // self.data.seq_len * self.data.seq_len
        return any(self.schedule.settings.rates(budget // tokens, 1.0).branch for budget in self.stages.budgets())


# The groups whose files are components.
_PLUGINS: dict[str, Registry] = {
    "form": FORMS,
    "factorizer": METHODS,
    "ranks": ALLOCATIONS,
    "schedule": SCHEDULES,
    "optimizer": OPTIMIZERS,
    "objective": OBJECTIVES,
    "engine": ENGINES,
}


def from_mapping(source: Mapping[str, Any]) -> Config:
    """Check a resolved mapping (the shape of conf/config.yaml). Raises UserError with one line that names the key."""
    kinds = get_type_hints(Config, include_extras=True)
    del kinds["evaluators"]
    source, further = _further(source)
    for key in source:
        if key not in kinds:
            raise UserError(f"{key}: unknown key{_did_you_mean(str(key), kinds)}")
    fields: dict[str, Any] = {}
    for key, kind in kinds.items():
        if key not in source:
            raise UserError(f"{key}: this key is missing")
        fields[key] = _choose(key, source[key]) if key in _PLUGINS else _validate(kind, source[key], key)
    config = Config(**fields, evaluators=evaluators(further))
    _check_together(config)
    return config


def _further(source: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """`source` without the settings of evaluators beside perplexity, and these by name."""
    section = source.get("evaluation")
    if not isinstance(section, Mapping):
        return source, {}
    further = {name: section[name] for name in EVALUATORS.names() if name != ALWAYS and name in section}
    return {**source, "evaluation": {key: section[key] for key in section if key not in further}}, further


def evaluators(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluator of each name, made with its `settings`. Raises UserError, naming the key."""
    return {name: _component(EVALUATORS, name, value, f"evaluation.{name}") for name, value in settings.items()}


def _component(registry: Registry, name: str, options: Any, key: str) -> Any:
    # A component declares a plain dataclass: it knows nothing of pydantic.
    kind = pydantic.dataclasses.dataclass(registry.settings_of(name), frozen=True, config=STRICT)
    return _validate(kind, options, key)


def _choose(group: str, value: Any) -> Chosen:
    registry = _PLUGINS[group]
    names = registry.names()
    if not isinstance(value, Mapping) or "name" not in value:
        raise UserError(f"{group}: choose one of {', '.join(names)}")
    options = {key: whole(option) for key, option in value.items() if key != "name"}
    if value["name"] not in names:
        raise UserError(f"{group}: there is no {value['name']!r}; choose one of {', '.join(names)}")
    return Chosen(value["name"], _component(registry, value["name"], options, group))


def _validate(kind: Any, value: Any, key: str) -> Any:
    try:
        # Strict JSON: a list may be a tuple and an int a float, but "3" is no number and 1 no truth value.
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
        where, message = ".".join([key, *path]), first["msg"].removeprefix("Value error, ")
        if first["type"] in ("unexpected_keyword_argument", "no_such_attribute"):
            section_kind = _at(kind, first["loc"][:-1])
            raise UserError(f"{where}: unknown key{_did_you_mean(path[-1], _field_names(section_kind))}") from None
        if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            raise UserError(f"{where}: this key is missing") from None
        text = first["type"] == "string_type" and first["input"] is not None
        mend = f"; text that reads as something else is quoted: '{where}=\"…\"'" if text else ""
        raise UserError(f"{where}: {message} (given: {first['input']!r}){mend}") from None


def _at(kind: Any, path: tuple[Any, ...]) -> Any:
    """The section below `kind` that a path of keys leads to; a key that is no field (a branch of a union) is passed
    over."""
    for part in path:
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part in hints:
            kind = next((k for k in (hints[part], *get_args(hints[part])) if dataclasses.is_dataclass(k)), None)
    return kind


def _field_names(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}" if known else ""


def _check_together(config: Config) -> None:
    """What no single key can tell."""
    stages = config.stages
    if stages.ratios and (stages.tokens is None) == (stages.total_tokens is None):
        raise UserError("stages.tokens: give either stages.tokens or stages.total_tokens, not both and not neither")
    if isinstance(stages.tokens, tuple) and len(stages.tokens) != len(stages.ratios):
        raise UserError(
            f"stages.tokens: {len(stages.tokens)} budgets for the {len(stages.ratios)} ratios of stages.ratios; give "
            "one number for all, or one each"
        )
    if config.parent.attention == "flash_attention_2" and config.engine.settings.dtype == "fp32":
        raise UserError(
            "parent.attention: flash_attention_2 does not compute in float32; choose engine.dtype=bf16, or sdpa"
        )
    if config.optimizer.settings.whole_matrices and not ENGINES.get(config.engine.name).WHOLE_MATRICES:
        raise UserError(
            f"optimizer: {config.optimizer.name} works on whole matrices, and engine={config.engine.name} on slices of "
            "them; choose engine=fsdp, or optimizer=adamw"
        )
    if config.recover.global_batch_tokens < config.data.seq_len:
        raise UserError(
            f"recover.global_batch_tokens: {config.recover.global_batch_tokens} is less than one sequence "
            f"(data.seq_len={config.data.seq_len})"
        )
    texts = {
        "factorizer.calibration_tokens": getattr(config.factorizer.settings, "calibration_tokens", None),
        "ranks.tokens": getattr(config.ranks.settings, "tokens", None),
    }
    for key, tokens in texts.items():
        if tokens is not None and tokens < config.data.seq_len:
            raise UserError(f"{key}: {tokens} is less than one sequence (data.seq_len={config.data.seq_len})")
    for budget in stages.budgets():
        if budget < config.recover.global_batch_tokens:
            raise UserError(
                f"stages.tokens: a stage of {budget} tokens is less than one step "
                f"(recover.global_batch_tokens={config.recover.global_batch_tokens})"
            )
    if config.parent.scratch is not None and config.parent.scratch.tokens < config.recover.global_batch_tokens:
        raise UserError(
            f"parent.scratch.tokens: {config.parent.scratch.tokens} tokens are less than one step "
            f"(recover.global_batch_tokens={config.recover.global_batch_tokens})"
        )
    for key in ("include", "exclude"):
        for pattern in getattr(config.linears, key):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"linears.{key}: {pattern!r} is no regular expression ({error})") from None

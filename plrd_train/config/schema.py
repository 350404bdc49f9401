"""The one schema of conf/: frozen dataclasses without defaults (the defaults stand in conf/, once), checked before any
work.

An unknown key, a wrong type and an impossible value each raise a UserError of one line that names the key. The
pluggable groups (factorizer, engine, objective) are checked against the settings that their own files declare, so that
a new one edits nothing here.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from plrd_train.compress.compressor import Compressor
from plrd_train.compress.forms import FORMS
from plrd_train.compress.methods import METHODS
from plrd_train.compress.ranks import ALLOCATIONS, MEASURING
from plrd_train.engine import ENGINES
from plrd_train.errors import UserError
from plrd_train.evaluate import ALWAYS, EVALUATORS
from plrd_train.recover.objectives import OBJECTIVES
from plrd_train.registry import Registry

_STRICT = ConfigDict(extra="forbid", strict=True)


def section(cls: type) -> Any:
    """A frozen dataclass that validates its fields and refuses unknown ones."""
    return pydantic.dataclasses.dataclass(frozen=True, config=_STRICT, kw_only=True)(cls)


def _whole(value: Any) -> Any:
    """Token counts are written 1e9: a float without a fraction is the integer it says."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _ratios(ratios: tuple[float, ...]) -> tuple[float, ...]:
    for before, ratio in zip((1.0, *ratios), ratios, strict=False):
        if not math.isfinite(ratio) or ratio < 1.0:
            raise ValueError(f"a ratio of {ratio} makes the model no smaller; ratios start at 1")
        if ratio <= before and before != 1.0:
            raise ValueError(f"{ratio} comes after {before}: ratios must grow from stage to stage")
    return ratios


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Ratios = Annotated[tuple[float, ...], AfterValidator(_ratios)]


@section
class Scratch:
    """Train the parent itself first, from random weights: `architecture` is a Hugging Face config.json, and its
    vocabulary is the tokenizer's."""

    architecture: dict[str, Any]
    # A folder or hub id whose tokenizer it takes; none: a sentencepiece one is trained on the corpus.
    tokenizer: str | None
    vocab_size: Positive  # of the tokenizer that is trained
    tokens: Positive
    lr: Rate


@section
class Parent:
    path: str
    revision: str | None
    trust_remote_code: bool
    # Null: what transformers chooses, sdpa where the architecture has it.
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None
    scratch: Scratch | None


@section
class Linears:
    """Regular expressions over whole module names. Embeddings and lm_head stay whole in any case."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]


@section
class Data:
    train: str
    validation: str
    revision: str | None
    seq_len: Annotated[Positive, Field(ge=2)]
    streams: Positive
    append_eos: bool
    skip_bad: bool
    embedded: bool  # write the text of the Python installation to the folder above `train` first


@section
class Stages:
    ratios: Ratios
    tokens: Positive | tuple[Positive, ...] | None
    total_tokens: Positive | None
    # How many times its predecessor's share of `total_tokens` a stage gets.
    growth: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

    def budgets(self) -> tuple[int, ...]:
        """Tokens of each stage."""
        n = len(self.ratios)
        if isinstance(self.tokens, tuple):
            return self.tokens
        if self.tokens is not None:
            return (self.tokens,) * n
        shares = [self.growth**i for i in range(n)]
        return tuple(int((self.total_tokens or 0) * share / sum(shares)) for share in shares)


@section
class Ranks:
    name: str
    multiple: Positive
    tokens: Positive | None  # of the text on which an allocation measures losses; null: it measures none


@section
class Recover:
    """One stage of fine-tuning. `branch` is the share of a stage's tokens in which a branch of the trunk is annealed to
    become the member; at 0, trunk and member are one. `lr` null: 0.1 / hidden size. `spike` and `patience` are those of
    `plrd_train.recover.guard`."""

    lr: Annotated[Rate, Field(gt=0.0)] | None
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Share
    final: Share
    branch: Share
    betas: tuple[Share, Share]
    eps: Annotated[Rate, Field(gt=0.0)]
    weight_decay: Rate
    clip: Annotated[Rate, Field(gt=0.0)]
    spike: Annotated[Rate, Field(gt=0.0)] | None
    patience: Positive
    global_batch_tokens: Positive
    micro_batch: Positive  # sequences that one rank takes through the model at once


@section
class Checkpoint:
    """A stage that is under way is saved every so many tokens or minutes (null: not by that measure), and the newest
    `keep` checkpoints stay beside the ends of stages."""

    tokens: Positive | None
    minutes: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None
    keep: Positive


@section
class Evaluation:
    """Of perplexity (`plrd_train.evaluate.perplexity`). The keys `evaluation.NAME` are the settings of the further
    evaluator NAME, and stand in `Config.evaluators`."""

    context: Annotated[Positive, Field(ge=2)]
    tokens: Positive
    batch: Positive


@section
class Wandb:
    mode: Literal["offline", "online", "disabled"]
    project: str
    name: str | None


@section
class Tracking:
    wandb: Wandb


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
    ranks: Ranks
    recover: Recover
    checkpoint: Checkpoint
    objective: Chosen
    engine: Chosen
    evaluation: Evaluation
    tracking: Tracking
    evaluators: dict[str, Any]  # no key: by name, the evaluators that `evaluation` has settings of

    def compressor(self) -> Compressor:
        """How the run compresses a model."""
        return Compressor(self.factorizer.settings, self.ranks.name, self.ranks.multiple, self.ranks.tokens)


# The groups whose files are components.
_PLUGINS: dict[str, Registry] = {"form": FORMS, "factorizer": METHODS, "objective": OBJECTIVES, "engine": ENGINES}


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
    kind = pydantic.dataclasses.dataclass(registry.settings_of(name), frozen=True, config=_STRICT)
    return _validate(kind, options, key)


def _choose(group: str, value: Any) -> Chosen:
    registry = _PLUGINS[group]
    names = registry.names()
    if not isinstance(value, Mapping) or "name" not in value:
        raise UserError(f"{group}: choose one of {', '.join(names)}")
    options = {key: option for key, option in value.items() if key != "name"}
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
    if config.ranks.name not in ALLOCATIONS:
        raise UserError(f"ranks: there is no {config.ranks.name!r}; choose one of {', '.join(ALLOCATIONS)}")
    if (config.ranks.tokens is None) == (config.ranks.name in MEASURING):
        raise UserError(
            f"ranks.tokens: {config.ranks.name} measures losses on text; give a number of tokens"
            if config.ranks.tokens is None
            else f"ranks.tokens: {config.ranks.name} measures nothing on text; leave it at null"
        )
    if config.parent.attention == "flash_attention_2" and config.engine.settings.dtype == "fp32":
        raise UserError(
            "parent.attention: flash_attention_2 does not compute in float32; choose engine.dtype=bf16, or sdpa"
        )
    if config.recover.global_batch_tokens < config.data.seq_len:
        raise UserError(
            f"recover.global_batch_tokens: {config.recover.global_batch_tokens} is less than one sequence "
            f"(data.seq_len={config.data.seq_len})"
        )
    texts = {
        "factorizer.calibration_tokens": getattr(config.factorizer.settings, "calibration_tokens", None),
        "ranks.tokens": config.ranks.tokens,
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

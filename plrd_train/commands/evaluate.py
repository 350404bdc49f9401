"""`plrd evaluate`: perplexity and more of one published model, or of a family's parent and every member."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plrd_train.commands._arguments import add_remote_code, given_path, whole
from plrd_train.commands._models import family_of, find, lies_at
from plrd_train.errors import UserError
from plrd_train.evaluate import ALWAYS, EVALUATORS, others
from plrd_train.family import Family
from plrd_train.tracking import console

if TYPE_CHECKING:
    from plrd_train.config.schema import Config
    from plrd_train.data.corpus import Corpus
    from plrd_train.evaluate._held_out import HeldOut
    from plrd_train.parents.published import Published

HELP = "measure held-out perplexity: of one model, or of a family's parent and every member"
EXAMPLES = (
    "plrd evaluate runs/quickstart",
    "plrd evaluate runs/quickstart/members/2.25x --data my_texts/ --json",
    "plrd evaluate runs/quickstart --with speed speed.tokens=64",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = "a member's folder, any other model (folder or hub id), or the run_dir of a family"
    parser.add_argument("model", metavar="MEMBER|FAMILY", type=given_path, help=models)
    text = "a folder, glob or hub id of held-out text (default: the family's data.validation)"
    parser.add_argument("--data", metavar="CORPUS", type=given_path, help=text)
    own = "default: as the family's run did, else %s"
    parser.add_argument("--context", metavar="N", type=whole(2), help=f"tokens read of each document ({own % 256})")
    parser.add_argument("--tokens", metavar="N", type=whole(1), help=f"predicted tokens, at most ({own % '1,000,000'})")
    parser.add_argument(
        "--batch", metavar="N", type=whole(1), help=f"documents at once, a matter of speed and memory ({own % 8})"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help=f"what it computes in; the weights are as published ({own % 'fp32'})"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave bad lines of the corpus out and count them instead of ending"
    )
    names = ", ".join(name for name in EVALUATORS.names() if name != ALWAYS)
    parser.add_argument("--with", dest="further", metavar="E[,E2,…]", default="", help=f"measure these too: {names}")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="settings of what --with names, as speed.tokens=64"
    )
    add_remote_code(parser)


def run(given: argparse.Namespace) -> dict[str, Any]:
    import torch

    from plrd_train.config.resolved import read
    from plrd_train.config.schema import from_mapping
    from plrd_train.parents.published import open_published

    further = _further(given.further, given.overrides)
    folder, remote_code = Path(given.model), given.trust_remote_code
    is_family = (folder / "family.json").is_file()
    home = folder if is_family else family_of(folder)
    source = read(home) if home else None
    config = from_mapping(source) if source else None
    family = parent = None
    if home and (is_family or further):
        family = Family.read(home)
        path, revision = lies_at(family.parent.path, home, config), family.parent.revision or "main"
        parent = find(path, revision, remote_code=remote_code)
    if is_family:  # all models are found before the first is measured
        assert family is not None and parent is not None
        models = {"parent": parent}
        models |= {m.name: find(str(folder / m.path), remote_code=remote_code) for m in family.members}
    else:
        models = {given.model: find(given.model, remote_code=remote_code)}
    evaluators = _evaluators(further, source)
    held_out = _held_out(given, home, config)
    name_of_dtype = given.dtype or getattr(config.engine.settings if config else None, "dtype", "fp32")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name_of_dtype]

    @cache
    def opened_parent() -> Published:
        assert parent is not None
        return open_published(parent, dtype, trust_remote_code=remote_code)

    results = {}
    for name, files in models.items():
        model = open_published(files, dtype, trust_remote_code=remote_code)
        if given.context and model.context and given.context > model.context:
            raise UserError(f"--context: {given.context} tokens, but {files.path} reads at most {model.context}")
        to_compare = opened_parent if parent is not None and files is not parent else None
        try:
            with held_out.subject(model, name, to_compare) as subject:
                results[name] = {**held_out.perplexity(subject), "tasks": {}}
            results[name] |= others(evaluators, subject)
        except UserError as error:
            raise UserError(str(error).replace("data.skip_bad=true", "--skip-bad")) from None
    if not given.json:
        _print(results, list(evaluators))
    return {"parent": results.pop("parent"), "members": results} if is_family else results[given.model]


def _held_out(given: argparse.Namespace, home: Path | None, config: Config | None) -> HeldOut:
    """The text to evaluate on and how much of it: as the options say; else as the run in `home` did it; else by the
    defaults in conf/."""
    import yaml

    from plrd_train.config.compose import CONF
    from plrd_train.data.corpus import resolve_corpus
    from plrd_train.evaluate._held_out import HeldOut
    from plrd_train.evaluate._settings import Evaluation
    from plrd_train.evaluate.perplexity import Evaluator

    settings = (
        config.evaluation
        if config
        else Evaluation(**yaml.safe_load((CONF / "evaluation" / "perplexity.yaml").read_text()))
    )
    skip_bad = given.skip_bad
    if given.data is not None:
        corpus = resolve_corpus(given.data, "validation")
    elif config is not None and home is not None:
        corpus = resolve_corpus(lies_at(config.data.validation, home, config), "validation", config.data.revision)
        skip_bad = skip_bad or config.data.skip_bad
    else:
        raise UserError(f"--data: {given.model} is of no run that says what to evaluate on; give --data CORPUS")
    if config is not None and home is not None:
        _say_overlap(corpus, home, config)
    perplexity = Evaluator(
        given.context or settings.context, given.tokens or settings.tokens, given.batch or settings.batch
    )
    return HeldOut(corpus, perplexity, skip_bad)


def _further(names: str, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """The evaluators of --with, each with the settings that KEY=VALUE give it. Raises UserError."""
    import yaml

    further: dict[str, dict[str, Any]] = {}
    known = [name for name in EVALUATORS.names() if name != ALWAYS]
    for name in filter(None, names.split(",")):
        if name not in known:
            raise UserError(f"--with: there is no evaluator {name}; choose of {', '.join(known)}")
        further[name] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        name, _, setting = key.partition(".")
        if not equals or not setting or name not in further:
            raise UserError(f"{override}: no setting of what --with names; give NAME.KEY=VALUE")
        try:
            further[name][setting] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{override}: this value cannot be read; quote text") from None
    return further


def _evaluators(further: dict[str, dict[str, Any]], source: dict[str, Any] | None) -> dict[str, Any]:
    """The evaluators of --with: their settings are those given; else those of the run's config `source`; else the
    defaults in conf/."""
    import yaml

    from plrd_train.config.compose import conf_folders
    from plrd_train.config.schema import evaluators

    settings = {}
    for name, given in further.items():
        files = [file for folder in conf_folders() if (file := folder / "evaluation" / f"{name}.yaml").is_file()]
        defaults = yaml.safe_load(files[0].read_text()) or {} if files else {}
        own = ((source or {}).get("evaluation") or {}).get(name, {})
        settings[name] = defaults | own | given
    return evaluators(settings)


def _say_overlap(held_out: Corpus, home: Path, config: Config) -> None:
    """Print a note where the run of `config` was trained on shards of `held_out`, if its corpus is still there."""
    from plrd_train.data.corpus import is_local, overlap, resolve_corpus

    train = lies_at(config.data.train, home, config)
    if is_local(train) != (held_out.revision is None):  # one is on the hub, and the other is not, or is gone
        return
    try:
        trained_on = resolve_corpus(train, "train", config.data.revision)
    except UserError:
        return
    if note := overlap(trained_on, held_out, "trained on"):
        console.say(note)


def _print(results: dict[str, dict[str, Any]], further: list[str]) -> None:
    """A table of perplexities, and below it one for each further evaluator."""
    from plrd_train.tracking.table import number

    domains = sorted({domain for row in results.values() for domain in row["domains"]})
    domains = domains if len(domains) > 1 else []
    rows = [
        [name, number(row["ppl"]), f"{row['nll_tokens']:,}", *(number(row["domains"].get(one)) for one in domains)]
        for name, row in results.items()
    ]
    console.table(["", "perplexity", "tokens", *domains], rows)
    for evaluator in further:
        found = {name: dict(_flat(row[evaluator])) for name, row in results.items()}
        keys = list(dict.fromkeys(key for row in found.values() for key in row))
        console.say("")
        console.table(
            [evaluator, *keys], [[name, *(_shown(row.get(key)) for key in keys)] for name, row in found.items()]
        )


def _flat(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in result.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        elif value is not None:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    from plrd_train.tracking.table import number

    return number(value) if value is None or isinstance(value, float) else str(value)

"""`plrd evaluate`: perplexity of one published model, or of a family's parent and every member."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plrd_train.commands._arguments import add_remote_code, given_path, whole
from plrd_train.commands._models import family_of, find, lies_at
from plrd_train.errors import UserError
from plrd_train.family import Family
from plrd_train.tracking import console

if TYPE_CHECKING:
    from plrd_train.config.schema import Config
    from plrd_train.data.corpus import Corpus
    from plrd_train.evaluate.held_out import HeldOut

HELP = "measure held-out perplexity: of one model, or of a family's parent and every member"
EXAMPLES = (
    "plrd evaluate runs/quickstart",
    "plrd evaluate runs/quickstart/members/2.25x --data my_texts/ --json",
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
    add_remote_code(parser)


def run(given: argparse.Namespace) -> dict[str, Any]:
    import torch

    from plrd_train.config.resolved import read
    from plrd_train.config.schema import from_mapping
    from plrd_train.evaluate.published import open_published

    folder, remote_code = Path(given.model), given.trust_remote_code
    is_family = (folder / "family.json").is_file()
    home = folder if is_family else family_of(folder)
    source = read(home) if home else None
    config = from_mapping(source) if source else None
    if is_family:  # all models are found before the first is measured
        family = Family.read(folder)
        path, revision = lies_at(family.parent.path, folder, config), family.parent.revision or "main"
        models = {"parent": find(path, revision, remote_code=remote_code)}
        models |= {m.name: find(str(folder / m.path), remote_code=remote_code) for m in family.members}
    else:
        models = {given.model: find(given.model, remote_code=remote_code)}
    held_out = _held_out(given, home, config)
    name_of_dtype = given.dtype or getattr(config.engine.settings if config else None, "dtype", "fp32")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name_of_dtype]
    results = {}
    for name, files in models.items():
        model = open_published(files, dtype, trust_remote_code=remote_code)
        if given.context and model.context and given.context > model.context:
            raise UserError(f"--context: {given.context} tokens, but {files.path} reads at most {model.context}")
        try:
            results[name] = held_out.measure(model, name).to_dict() | {"tasks": {}}
        except UserError as error:
            raise UserError(str(error).replace("data.skip_bad=true", "--skip-bad")) from None
    if not given.json:
        _print(results)
    return {"parent": results.pop("parent"), "members": results} if is_family else results[given.model]


def _held_out(given: argparse.Namespace, home: Path | None, config: Config | None) -> HeldOut:
    """The text to evaluate on and how much of it: as the options say; else as the run in `home` did it; else by the
    defaults in conf/."""
    import yaml

    from plrd_train.config.compose import CONF
    from plrd_train.config.schema import Evaluation
    from plrd_train.data.corpus import resolve_corpus
    from plrd_train.evaluate.held_out import HeldOut

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
    return HeldOut(
        corpus,
        given.context or settings.context,
        given.tokens or settings.tokens,
        given.batch or settings.batch,
        skip_bad,
    )


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


def _print(results: dict[str, dict[str, Any]]) -> None:
    from plrd_train.tracking.table import number

    domains = sorted({domain for row in results.values() for domain in row["domains"]})
    domains = domains if len(domains) > 1 else []
    rows = [
        [name, number(row["ppl"]), f"{row['nll_tokens']:,}", *(number(row["domains"].get(one)) for one in domains)]
        for name, row in results.items()
    ]
    console.table(["", "perplexity", "tokens", *domains], rows)

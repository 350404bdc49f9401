"""The `plrd` command: what one does with a finished family. Each sub-command imports what it alone needs, so that help
and `show` come soon."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plrd_train.commands._arguments import Parser, given_folder, given_path, number, whole
from plrd_train.commands.factor import add_arguments as factor_arguments
from plrd_train.commands.plan import add_arguments as plan_arguments
from plrd_train.errors import UserError
from plrd_train.family import Family
from plrd_train.tracking import console

if TYPE_CHECKING:
    from plrd_train.config.schema import Config
    from plrd_train.data.corpus import Corpus
    from plrd_train.evaluate.held_out import HeldOut
    from plrd_train.parents.parent import Parent

EXAMPLES = """examples:
  plrd show runs/quickstart
  plrd evaluate runs/quickstart
  plrd evaluate runs/quickstart/members/2.25x --data my_texts/ --json
  plrd generate runs/quickstart/members/2.25x --prompt "Return the"
  plrd report runs/quickstart
  plrd factor meta-llama/Llama-2-7b-hf runs/rom --method rom --budget 0.8 --calibration texts/
  plrd plan experiment=mistral_7b engine=zero3 --world-size 8 --device H100

FAMILY is the run_dir of a run; MEMBER the folder of one of its members, or any model: a Hugging Face folder or hub id.
Families are made by `plrd factor`, without training, and by:
  torchrun --nproc_per_node N -m plrd_train experiment=NAME key=value …
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command. Returns the exit status: 2 after a user's mistake, told in one line on standard error."""
    try:
        given = _parser().parse_args(arguments)
        console.set_main(True, to_stderr=given.json)
        result = given.run(given)
        if given.json:
            print(json.dumps(_finite(result), ensure_ascii=False, allow_nan=False))
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:  # as of `plrd show … | head`; Python would complain when it closes standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    return 0


def _show(given: argparse.Namespace) -> dict[str, Any]:
    family = Family.read(given.family)
    if not given.json:
        console.family_table(family.parent, family.members)
    members = [
        {**member, "absolute_path": str((family.folder / member["path"]).resolve())} for member in family.members
    ]
    return {"parent": family.parent, "members": members}


def _report(given: argparse.Namespace) -> dict[str, Any]:
    from plrd_train.report.page import write_report

    path = write_report(given.family).resolve()
    if not given.json:
        console.say(str(path))
    return {"report": str(path)}


def _factor(given: argparse.Namespace) -> dict[str, Any]:
    from plrd_train.commands import factor as command

    return command.run(given)


def _plan(given: argparse.Namespace) -> dict[str, Any]:
    from plrd_train.commands import plan as command

    return command.run(given)


def _generate(given: argparse.Namespace) -> dict[str, Any]:
    from plrd_train.evaluate.generate import generate
    from plrd_train.evaluate.published import open_published

    files = _find(given, given.model)
    completion = generate(
        open_published(files, trust_remote_code=given.trust_remote_code),
        given.prompt,
        given.max_tokens,
        given.temperature,
        given.seed,
    )
    if not given.json:
        console.say(completion.text)
    return completion.to_dict()


def _evaluate(given: argparse.Namespace) -> dict[str, Any]:
    import torch

    from plrd_train.config.resolved import read
    from plrd_train.config.schema import from_mapping
    from plrd_train.evaluate.published import open_published

    folder = Path(given.model)
    is_family = (folder / "family.json").is_file()
    home = folder if is_family else _family_of(folder)
    source = read(home) if home else None
    config = from_mapping(source) if source else None
    if is_family:  # everything is found before the first is measured
        family = Family.read(folder)
        models = {
            "parent": _find(
                given, _lies_at(str(family.parent["path"]), folder, config), family.parent.get("revision") or "main"
            )
        }
        models |= {member["name"]: _find(given, str(folder / member["path"])) for member in family.members}
    else:
        models = {given.model: _find(given, given.model)}
    held_out = _held_out(given, home, config)
    dtype = given.dtype or getattr(config.engine.settings if config else None, "dtype", "fp32")
    results = {}
    for name, files in models.items():
        model = open_published(
            files, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], trust_remote_code=given.trust_remote_code
        )
        if given.context and model.context and given.context > model.context:
            raise UserError(f"--context: {given.context} tokens, but {files.path} reads at most {model.context}")
        try:
            results[name] = held_out.measure(model, name).to_dict() | {"tasks": {}}
        except UserError as error:
            raise UserError(str(error).replace("data.skip_bad=true", "--skip-bad")) from None
    if not given.json:
        _print_perplexities(results)
    return {"parent": results.pop("parent"), "members": results} if is_family else results[given.model]


def _held_out(given: argparse.Namespace, home: Path | None, config: Config | None) -> HeldOut:
    """The text to evaluate on, and how: as the options say; for the rest as the run in `home` did it, or, without one,
    by the defaults in conf/."""
    import yaml

    from plrd_train.config.compose import CONF
    from plrd_train.data.corpus import resolve_corpus
    from plrd_train.evaluate.held_out import HeldOut
    from plrd_train.evaluate.settings import Evaluation

    settings = (
        config.evaluation
        if config
        else Evaluation(**yaml.safe_load((CONF / "evaluation" / "perplexity.yaml").read_text()))
    )
    skip_bad = given.skip_bad
    if given.data is not None:
        corpus = resolve_corpus(given.data, "validation")
    elif config is not None and home is not None:
        corpus = resolve_corpus(_lies_at(config.data.validation, home, config), "validation", config.data.revision)
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
    """Say so where the run of `config` was trained on shards of `held_out`, as far as its corpus is still there."""
    from plrd_train.data.corpus import is_local, overlap, resolve_corpus

    train = _lies_at(config.data.train, home, config)
    if is_local(train) != (held_out.revision is None):  # one is on the hub, and the other is not, or is gone
        return
    try:
        trained_on = resolve_corpus(train, "train", config.data.revision)
    except UserError:
        return
    if note := overlap(trained_on, held_out, "trained on"):
        console.say(note)


def _lies_at(path: str, home: Path, config: Config | None) -> str:
    """`path` as the run of `config` names it; what lay inside its run_dir has moved along with it to `home`."""
    if config is not None and Path(path).is_relative_to(config.run_dir):
        inside = home / Path(path).relative_to(config.run_dir)
        return str(inside) if inside.exists() else path
    return path


def _find(given: argparse.Namespace, path: str, revision: str = "main") -> Parent:
    """The files of a model, with more words about families than a model's own errors have."""
    from transformers.utils import logging

    from plrd_train.evaluate.published import find_published

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "family.json").is_file():
            raise UserError(f"{path}: a family; give one of its members: {_members(folder)}")
        raise UserError(f"{path}: neither a model (no config.json here) nor a family (no family.json)")
    home = _family_of(folder)
    if home and not folder.exists():
        raise UserError(f"{path}: no such member here; there are {_members(home)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    files = find_published(path, revision, trust_remote_code=given.trust_remote_code)
    for note in files.notes:
        console.say(f"note: {note}")
    return files


def _family_of(member: Path) -> Path | None:
    """The family in whose folder of members `member` lies."""
    home = member.absolute().parent.parent
    return home if member.absolute().parent.name == "members" and (home / "family.json").is_file() else None


def _members(home: Path) -> str:
    folders = (home / member["path"] for member in Family.read(home).members)
    return ", ".join(str(folder) for folder in folders if folder.is_dir()) or "none"


def _print_perplexities(rows: dict[str, dict[str, Any]]) -> None:
    from plrd_train.tracking.table import number

    domains = sorted({domain for row in rows.values() for domain in row["domains"]})
    domains = domains if len(domains) > 1 else []
    cells = [["", "perplexity", "tokens", *domains]]
    cells += [
        [
            name,
            number(row["ppl"]),
            f"{row['nll_tokens']:,}",
            *(number(row["domains"].get(domain)) for domain in domains),
        ]
        for name, row in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *values in cells:
        console.say(
            "  ".join(
                [name.ljust(widths[0]), *(value.rjust(width) for value, width in zip(values, widths[1:], strict=True))]
            )
        )


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="plrd", description="What one does with a finished family of models.", epilog=EXAMPLES, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"plrd {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output, and nothing else there"
        )
        return sub

    show = command("show", _show, "show the parent and its members: sizes, ratios, perplexities, tokens")
    evaluate = command(
        "evaluate", _evaluate, "measure held-out perplexity: of one model, or of a family's parent and every member"
    )
    generate = command("generate", _generate, "continue a prompt, greedily unless told otherwise")
    report = command("report", _report, "write the report of a family again and print its path")
    factor = command(
        "factor", _factor, "factor a parent without training, on this one process: a family of its members"
    )
    plan = command("plan", _plan, "say what a run takes before it is launched: memory, hours, disk")

    for sub in (show, report):
        sub.add_argument("family", metavar="FAMILY", type=given_folder, help="the run_dir of a family")
    models = "a member's folder, any other model (folder or hub id), or the run_dir of a family"
    evaluate.add_argument("model", metavar="MEMBER|FAMILY", type=given_path, help=models)
    text = "a folder, glob or hub id of held-out text (default: the family's data.validation)"
    evaluate.add_argument("--data", metavar="CORPUS", type=given_path, help=text)
    own = "default: as the family's run did, else %s"
    evaluate.add_argument("--context", metavar="N", type=whole(2), help=f"tokens read of each document ({own % 256})")
    evaluate.add_argument(
        "--tokens", metavar="N", type=whole(1), help=f"predicted tokens, at most ({own % '1,000,000'})"
    )
    evaluate.add_argument(
        "--batch", metavar="N", type=whole(1), help=f"documents at once, a matter of speed and memory ({own % 8})"
    )
    evaluate.add_argument(
        "--dtype", choices=("fp32", "bf16"), help=f"what it computes in; the weights are as published ({own % 'fp32'})"
    )
    evaluate.add_argument(
        "--skip-bad", action="store_true", help="leave bad lines of the corpus out and count them instead of ending"
    )
    models = "a member's folder, or any other model (folder or hub id)"
    generate.add_argument("model", metavar="MEMBER|PARENT", type=given_path, help=models)
    generate.add_argument("--prompt", metavar="P", required=True, help="the text to continue")
    generate.add_argument(
        "--max-tokens",
        metavar="N",
        type=whole(1),
        default=128,
        help="tokens to write, fewer where text or context ends (default: %(default)s)",
    )
    generate.add_argument(
        "--temperature",
        metavar="T",
        type=number(),
        default=0.0,
        help="0: always the likeliest token; above: sample from softmax(logits / temperature)",
    )
    generate.add_argument("--seed", metavar="N", type=int, default=0, help="of the sampling (default: %(default)s)")
    plan_arguments(plan)
    factor_arguments(factor)
    for sub in (evaluate, generate, factor):
        sub.add_argument(
            "--trust-remote-code", action="store_true", help="run the tokenizer's own code, where the model brings some"
        )
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("plrd-train")
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout that is not installed"


if __name__ == "__main__":
    sys.exit(main())

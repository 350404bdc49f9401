"""`plrd factor`: its options, and the family that it leaves behind."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plrd_train.commands._arguments import add_remote_code, given_folder, given_path, number
from plrd_train.compress.forms import FORMS
from plrd_train.compress.methods import METHODS
from plrd_train.errors import UserError
from plrd_train.family import Family, Member, ParentRecord, Scores
from plrd_train.tracking import console

if TYPE_CHECKING:
    from plrd_train.config.schema import Config
    from plrd_train.data.corpus import Corpus
    from plrd_train.oneshot import OneShot, Ranks, Text
    from plrd_train.parents.parent import Parent

HELP = "factor a parent without training, on this one process: a family of its members"
EXAMPLES = ("plrd factor meta-llama/Llama-2-7b-hf runs/rom --method rom --budget 0.8 --calibration texts/",)

# Defaults that differ from the main job's: LLM-ROM's sequence length, and a batch that suits a CPU.
_OWN = ("data.seq_len=128", "recover.micro_batch=8")
# The keys that KEY=VALUE may set; the others of the main job have no meaning here.
_KEYS = (
    *("factorizer.", "ranks.", "linears.", "evaluation.", "recover.micro_batch", "seed"),
    *(f"data.{key}" for key in ("seq_len", "streams", "append_eos", "skip_bad", "revision")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parent", metavar="PARENT", type=given_path, help="a Hugging Face folder or hub id")
    parser.add_argument("out", metavar="OUT", type=given_folder, help="the folder of the family, as of a run")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="further keys of conf/, as factorizer.epochs=8 data.seq_len=2048",
    )
    parser.add_argument(
        "--method", metavar="M", required=True, help=f"factorizer= of the main job: {', '.join(METHODS.names())}"
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument(
        "--ratio",
        metavar="R[,R2,…]",
        type=_ratios,
        help="parameters of the Linears, the parent's over a member's: a member each",
    )
    wanted.add_argument(
        "--budget",
        metavar="B",
        type=number(above=0, most=1),
        help="the share of all parameters to keep, by factoring the last blocks alone (LLM-ROM)",
    )
    parser.add_argument(
        "--form",
        metavar="FORM",
        default="lowrank",
        help=f"what stands in a Linear's place: {', '.join(FORMS.names())} (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks", metavar="ALLOCATION", default="uniform", help="uniform, energy or sensitivity (default: %(default)s)"
    )
    text = "a folder, glob or hub id of text, for methods and ranks that look at some"
    parser.add_argument("--calibration", metavar="CORPUS", type=given_path, help=text)
    parser.add_argument("--data", metavar="CORPUS", type=given_path, help="measure held-out perplexity on this one")
    parser.add_argument("--revision", metavar="R", help="of a PARENT on the hub (default: its main branch)")
    add_remote_code(parser)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Make the members that `given` asks for and that do not exist yet. Raises UserError."""
    from transformers.utils import logging

    from plrd_train.data.corpus import overlap, resolve_corpus
    from plrd_train.oneshot import OneShot
    from plrd_train.parents.parent import open_parent
    from plrd_train.publish.card import member_card
    from plrd_train.report.page import write_report

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = _config(given)
    held_out = resolve_corpus(given.data, "validation") if given.data else None
    calibration = resolve_corpus(given.calibration, "train", config.data.revision) if given.calibration else None
    if (
        held_out
        and calibration
        and config.compressor().needs().text
        and (note := overlap(calibration, held_out, "calibrated on"))
    ):
        console.say(note)
    parent = open_parent(given.parent, given.revision or "main", given.trust_remote_code)
    _check_parent(given, config, parent)
    oneshot = OneShot(parent, config, _text(given, config, parent, calibration), unfinished=given.out / "factors")
    made_by = {
        "form": config.form.name,
        "factorizer": {"name": config.factorizer.name, **vars(config.factorizer.settings)},
        "allocation": config.ranks.name,
    }
    asked: dict[str, Ranks | float] = {f"{ratio:g}x": ratio for ratio in given.ratio or ()}
    if given.budget is not None:
        asked = {f"budget-{given.budget:g}": oneshot.of_budget(given.budget)}
    family = _family(given, parent, asked, made_by)
    if family is None:
        record = ParentRecord(path=given.parent, revision=parent.revision, params=oneshot.params)
        if held_out:
            scores = _perplexity(given, config, held_out, parent.folder, "the parent")
            record = record.model_copy(update={"eval": scores})
        family = Family(given.out, record)
        family.folder.mkdir(parents=True, exist_ok=True)
        family.write()
    start = time.perf_counter()
    for writer, ranks in oneshot.write(
        {family.member_folder(name): of for name, of in asked.items() if not family.has(name)}
    ):
        name = writer.folder.name
        of = asked[name]
        made = _member(name, of if isinstance(of, float) else None, oneshot, ranks)
        made = made.model_copy(update={**made_by, "seconds": {"factor": time.perf_counter() - start}})
        if held_out:
            scores = _perplexity(given, config, held_out, str(writer.draft), name)
            made = made.model_copy(update={"eval": scores, "eval_factored": scores})
        writer.commit(member_card(made, family.parent, made_by))
        family.members.append(made)
        family.write()
        oneshot.kept.clear()
        start = time.perf_counter()
    oneshot.kept.clear()  # a process killed just after its last member leaves some
    write_report(family.folder)
    if not given.json:
        console.family_table(family)
    return family.to_dict()


def _config(given: argparse.Namespace) -> Config:
    from plrd_train.config.compose import compose
    from plrd_train.config.overrides import literal
    from plrd_train.config.schema import from_mapping

    for override in given.overrides:
        if not override.lstrip("+~").startswith(_KEYS):
            raise UserError(f"{override}: means nothing here; keys are {', '.join(_KEYS)}")
    if given.budget is not None and given.ranks != "uniform":
        raise UserError(
            "--budget: LLM-ROM's ranks are uniform in the blocks that it factors; leave --ranks out, or give --ratio"
        )
    paths = {"parent.path": given.parent, "run_dir": given.out.absolute()}
    paths |= {"data.train": given.calibration} if given.calibration else {}
    chosen = {"form": given.form, "factorizer": given.method, "ranks": given.ranks} | paths
    (source,) = compose([*(f"{key}={literal(str(value))}" for key, value in chosen.items()), *_OWN, *given.overrides])
    config = from_mapping(source)
    if config.compressor().needs().text and not given.calibration:
        looks = f"--method {given.method}" if config.factorizer.settings.statistic else f"--ranks {given.ranks}"
        raise UserError(f"--calibration: {looks} looks at text; give --calibration CORPUS")
    return config


def _check_parent(given: argparse.Namespace, config: Config, parent: Parent) -> None:
    """Raise UserError where the parent does not allow what is asked for, and print what of it stays whole."""
    from plrd_train.parents.parent import load_config
    from plrd_train.parents.reach import check_lengths, notes

    hub_config = load_config(parent)
    lengths = {"data.seq_len": config.data.seq_len} if given.calibration else {}
    check_lengths(
        hub_config, lengths | ({"evaluation.context": config.evaluation.context} if given.data else {}), given.parent
    )
    for note in (*parent.notes, *notes(hub_config, given.ratio or ())):
        console.say(f"note: {note}")


def _text(given: argparse.Namespace, config: Config, parent: Parent, corpus: Corpus | None) -> Text:
    """text(tokens): that much of the calibration `corpus`, read once."""
    from plrd_train.parents.parent import load_tokenizer
    from plrd_train.parents.tokenization import compare
    from plrd_train.training import calibration_text

    tokenizer = load_tokenizer(parent, given.trust_remote_code)
    if corpus is not None:
        compare(tokenizer, Path(parent.folder), corpus)

    @cache
    def text(tokens: int) -> Any:
        assert corpus is not None
        return calibration_text(config, corpus, tokenizer, tokens, rank=0, world_size=1)

    return text


def _family(
    given: argparse.Namespace, parent: Parent, asked: Mapping[str, Any], made_by: Mapping[str, Any]
) -> Family | None:
    """The family in OUT, to which the members that are `asked` for can be added; None where there is none yet. Raises
    UserError where it is another family."""
    family = Family.find(given.out)
    if family is None:
        if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
            raise UserError(f"{given.out}: exists, and is no family; choose another OUT")
        return None
    if (given.out / "config.yaml").exists():
        raise UserError(f"{given.out}: the folder of a run, which alone adds to it; choose another OUT")
    if (family.parent.path, family.parent.revision) != (given.parent, parent.revision):
        raise UserError(f"{given.out}: a family of {family.parent.path}; choose another OUT for {given.parent}")
    for member in family.members:
        if member.name in asked and any(getattr(member, key) != value for key, value in made_by.items()):
            raise UserError(f"{given.out}: has a member {member.name} that was made otherwise; choose another OUT")
    return family


def _member(name: str, asked: float | None, oneshot: OneShot, ranks: Ranks) -> Member:
    """The record of a member of these `ranks`; `asked` is the ratio that it was asked for by."""
    from plrd_train.compress.ranks import ratio_of

    shapes = oneshot.shapes
    ratio = ratio_of(shapes, ranks)
    saved = sum(
        shape.pair_params(shape.rank) - shape.params(ranks.get(linear, shape.rank)) for linear, shape in shapes.items()
    )
    return Member(
        name=name,
        ratio_requested=ratio if asked is None else asked,
        ratio=ratio,
        params=oneshot.params - saved,
        linear_params=sum(shape.params(ranks.get(linear, shape.rank)) for linear, shape in shapes.items()),
        form=oneshot.form,
        ranks=ranks,
        tokens_stage=0,
        tokens_total=0,
        tokens_lineage=0,
        path=f"members/{name}",
        made_from="parent",
        engine=None,
        world_size=1,
    )


def _perplexity(given: argparse.Namespace, config: Config, corpus: Corpus, folder: str, name: str) -> Scores:
    import torch

    from plrd_train.evaluate._held_out import HeldOut
    from plrd_train.evaluate.perplexity import Evaluator
    from plrd_train.parents.published import find_published, open_published

    settings = config.evaluation
    model = open_published(find_published(folder), torch.float32, trust_remote_code=given.trust_remote_code)
    evaluator = Evaluator(settings.context, settings.tokens, settings.batch)
    with HeldOut(corpus, evaluator, config.data.skip_bad).subject(model, name) as subject:
        return Scores(**evaluator(subject))


def _ratios(text: str) -> tuple[float, ...]:
    ratio = number(above=1)
    return tuple(sorted({ratio(part) for part in text.split(",")}))

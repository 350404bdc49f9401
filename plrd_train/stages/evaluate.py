"""The model in the engine is measured with the weights that it has when it is published."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from plrd_train.compress import forms
from plrd_train.compress.packing import packed
from plrd_train.engine import rounded
from plrd_train.evaluate import Subject, others
from plrd_train.evaluate.perplexity import perplexity
from plrd_train.family import Scores
from plrd_train.run import Run, Stage
from plrd_train.tracking import console


def evaluate(run: Run, when: str, stage: Stage | None = None) -> Scores:
    """Perplexity, and what the further evaluators of the config measure; `stage` None: of the parent."""
    with as_published(run):
        scores = _perplexity(run, when, stage)
        further = others(run.config.evaluators, Subject(run.engine, run.tokenizer, run.held_out))
    return Scores(**scores, **further)


def evaluate_factored(run: Run, stage: Stage) -> Scores:
    """Perplexity alone, straight after factoring."""
    with as_published(run):
        return Scores(**_perplexity(run, "straight after factoring", stage))


@contextmanager
def as_published(run: Run) -> Iterator[None]:
    """Inside, the engine has the weights of the published model: packed by the form, and rounded to its dtype."""
    form = run.config.form.name
    with rounded(run.engine, run.dtype, packed(run.engine, form) if forms.get(form).PACKS else ()):
        yield


def _perplexity(run: Run, when: str, stage: Stage | None) -> dict[str, Any]:
    measured = perplexity(run.engine, run.held_out, run.config.evaluation.batch)
    console.say(f"perplexity {when}{f', {stage.ratio:g}x' if stage else ''}: {measured.ppl:.4g}")
    metrics = {"val/loss": measured.loss, "val/ppl": measured.ppl}
    run.tracker.log_event("evaluation", {"stage/index": stage.index if stage else 0, "when": when, **metrics})
    return measured.to_dict()

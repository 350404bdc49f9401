"""What is measured of a model. One file an evaluator, named as the evaluator; adding a file (and its YAML in
conf/evaluation/) adds it.

A run chooses evaluators by `evaluation=[perplexity,NAME]`, and `plrd evaluate` by `--with NAME`. The YAML of NAME
begins with `# @package evaluation.NAME`, so that its settings are the keys `evaluation.NAME.*`. Perplexity is always
measured; its settings are `evaluation.*` themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from plrd_train.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from plrd_train.data.documents import EvalDocument
    from plrd_train.parents.published import Published


class OnRanks(Protocol):
    """A causal LM of transformers over one or many ranks: any engine, or `plrd_train.parents.published.Published`."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def share(self, value: object) -> list:
        """The small picklable `value` of every rank, in rank order, on every rank. A collective."""
        ...


@dataclass(frozen=True)
class Subject:
    """The model `on` its ranks, and what an evaluator may need beside it. `documents` are those of the held-out text
    that perplexity is measured on. `parent`, where there is one to compare with, loads it whole on this process.
    `on_tokens` is told how many tokens this rank has predicted since the last call."""

    on: OnRanks
    tokenizer: PreTrainedTokenizerBase
    documents: Sequence[EvalDocument]
    parent: Callable[[], Published] | None = None
    on_tokens: Callable[[int], None] | None = None


class Evaluator(Protocol):
    """What each file here defines, as a frozen dataclass named `Evaluator` whose fields are its settings."""

    published: ClassVar[bool]
    """Whether it measures only a published model, whole on one process. A run cannot choose such an evaluator."""

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """The result, in plain JSON types without NaN and infinity. In a run this is a collective: every rank calls it,
        and every rank returns the same."""
        ...


EVALUATORS = Registry("evaluator", "evaluate", settings="Evaluator")
ALWAYS = "perplexity"


def others(evaluators: dict[str, Any], subject: Subject) -> dict[str, Any]:
    """The result of each of `evaluators` (name -> Evaluator), under its name."""
    return {name: evaluator(subject) for name, evaluator in evaluators.items()}

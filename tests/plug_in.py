"""A plug-in: a package of its own, laid out as plrd_train, with one file a component and at most one YAML."""

from pathlib import Path

# Each component differs from ours in something that a run leaves behind.
FILES = {
    "conf/form/halves.yaml": "name: halves\n",
    "compress/forms/halves.py": """
from plrd_train.compress.forms.lowrank import PACKS, Linear, loaded, pack, pack_bytes, stored


def params(out_features, in_features, rank):  # half of what the pair costs, so that ranks are twice as large
    return rank * (out_features + in_features) // 2


def most_rank(out_features, in_features, params):
    return min(int(2 * params / (out_features + in_features)), out_features, in_features)
""",
    "compress/methods/_labelled.py": """
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Labelled:
    spectral: Any
    label: float

    @property
    def values(self):
        return self.spectral.values

    def cut(self, rank):
        return replace(self.spectral.cut(rank), rel_error=self.label)

    def to(self, device):
        return replace(self, spectral=self.spectral.to(device))
""",
    "conf/factorizer/labelled.yaml": "name: labelled\nlabel: 0.5\n",
    "compress/methods/labelled.py": """
from dataclasses import dataclass

from mine.compress.methods._labelled import Labelled

from plrd_train.compress.methods.svd import Method as Svd


@dataclass(frozen=True)
class Method(Svd):  # the error that it reports is its setting
    label: float

    def dense(self, weight, statistic=None):
        return Labelled(super().dense(weight), self.label)
""",
    "compress/statistics/counts.py": """
USES_GRADIENTS = False


def size(shape):
    return (1,)


def add(total, x, grad):
    total += len(x)
    return len(x)


def mean(total, count):  # the tokens that have reached the Linear
    return total
""",
    "conf/factorizer/counting.yaml": "name: counting\ncalibration_tokens: 64\n",
    "compress/methods/counting.py": """
from dataclasses import dataclass
from typing import ClassVar

from mine.compress.methods._labelled import Labelled

from plrd_train.compress.methods.svd import Method as Svd
from plrd_train.compress.steps import factor_by_statistic


@dataclass(frozen=True)
class Method(Svd):  # in order, and the error that it reports is the number of tokens
    sequential: ClassVar[bool] = True
    keeps_original: ClassVar[bool] = False
    trains_blocks: ClassVar[bool] = False
    statistic: ClassVar[str | None] = "counts"

    calibration_tokens: int

    def dense(self, weight, statistic=None):
        return Labelled(super().dense(weight), statistic.item())

    def factor_block(self, task):
        return factor_by_statistic(task, self)
""",
    "conf/ranks/fixed.yaml": "name: fixed\nmultiple: 1\nrank: 4\n",
    "compress/allocations/fixed.py": """
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Allocation:
    spectra: ClassVar[bool] = True
    losses: ClassVar[bool] = False

    multiple: int
    rank: int

    def ranks(self, shapes, ratio, values, losses):
        return {name: min(self.rank, len(values[name])) for name in shapes}
""",
    "conf/schedule/falling.yaml": "name: falling\nfactor: 0.5\n",
    "recover/schedules/falling.py": """
from dataclasses import dataclass

from plrd_train.recover.schedules import Rates


@dataclass(frozen=True)
class Schedule:
    factor: float

    def rates(self, steps, peak):
        return Rates(tuple(peak * self.factor**step for step in range(steps)))
""",
    "conf/optimizer/adam.yaml": "name: adam\nbeta: 0.9\n",
    "recover/optimizers/adam.py": """
from dataclasses import dataclass

import torch

from plrd_train.engine import Group


@dataclass(frozen=True)
class Optimizer:
    beta: float

    whole_matrices = False

    def group(self, parameter):
        return Group({}, ("exp_avg", "exp_avg_sq"))

    def open(self, groups, on_whole):
        return torch.optim.Adam(groups, lr=0.0, betas=(self.beta, self.beta), fused=True)
""",
    "conf/objective/halved.yaml": "name: halved\n",
    "recover/objectives/halved.py": """
from dataclasses import dataclass

from plrd_train.recover.objectives.ce import cross_entropy


@dataclass(frozen=True)
class Objective:  # of two terms: half the cross-entropy, and what makes three quarters of it
    def open(self, teacher):
        def terms(model, input_ids):
            loss = cross_entropy(model, input_ids)
            return {"half": loss / 2, "quarter": loss / 4}

        return terms
""",
    "conf/evaluation/accuracy.yaml": "# @package evaluation.accuracy\nfirst: 4\n",
    "evaluate/accuracy.py": """
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Evaluator:
    published: ClassVar[bool] = False

    first: int

    @torch.no_grad()
    def __call__(self, subject):
        on, hits, tokens = subject.on, 0, 0
        for document in subject.documents[: self.first]:  # on every rank alike
            ids = torch.tensor([document.ids], device=on.device)
            hits += (on.model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).sum().item()
            tokens += ids.shape[1] - 1
        return {"accuracy": hits / tokens, "tokens": tokens}
""",
    "commands/shout.py": """
from plrd_train.tracking import console

HELP = "say a word loudly"
EXAMPLES = ("plrd shout hey",)


def add_arguments(parser):
    parser.add_argument("word")


def run(given):
    if not given.json:
        console.say(given.word.upper())
    return {"word": given.word.upper()}
""",
}


def install(folder: Path, name: str = "mine", files: dict[str, str] = FILES) -> None:
    """Put the package `name` into `folder`, as pip would: with it on PYTHONPATH, its entry point is found."""
    for path, content in {"__init__.py": "", **files}.items():
        file = folder / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[plrd_train]\n{name} = {name}\n")

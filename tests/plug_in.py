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
    "conf/factorizer/scaled.yaml": "name: scaled\nscale: 0.5\n",
    "compress/methods/scaled.py": """
from dataclasses import dataclass

from plrd_train.compress.methods.svd import Factorizer as Svd


@dataclass(frozen=True)
class Factorizer(Svd):
    scale: float

    def dense(self, weight, statistic=None):
        return super().dense(weight * self.scale)
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

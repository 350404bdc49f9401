"""What family.json holds, as types: the parent, the members, and what was measured of them.

The keys are the contract of docs/concepts.md. A key that is not among them, as a note by hand or one of another
version, is kept as it is. A key that was never given is not written.
"""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Count = Annotated[int, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0.0)]
Path = Annotated[str, Field(pattern=r"^[^\x00]+$")]


class _Record(BaseModel):
    """`model_copy(update={…})` gives a changed copy."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, in the order of the fields."""
        return self.model_dump(exclude_unset=True)


class Scores(_Record):
    """What was measured of one model. The result of an evaluator other than perplexity stands under its own name."""

    ppl: Annotated[Annotated[float, Field(gt=0.0)] | None, AfterValidator(_finite)] = None
    """Perplexity; None where it is not finite."""
    nll_tokens: Count = 0
    """Predicted tokens that it was measured on."""
    domains: dict[str, float | None] = {}
    """Perplexity by domain."""


class ParentRecord(_Record):
    path: Path
    """As it was given: a folder, or a hub id at the commit `revision`."""
    revision: str | None = None
    params: Count
    eval: Scores | None = None

    @property
    def ppl(self) -> float | None:
        return self.eval.ppl if self.eval else None


class Member(_Record):
    name: str
    ratio_requested: Ratio
    ratio: Ratio
    params: Count
    linear_params: Count
    """Parameters of what stands in the place of all eligible Linears."""
    form: str = "lowrank"
    ranks: dict[str, Count]
    """Linear -> rank."""
    tokens_stage: Count = 0
    tokens_total: Count = 0
    tokens_lineage: Count = 0
    eval_factored: Scores | None = None
    """Straight after factoring."""
    eval: Scores | None = None
    path: Path
    """Of its folder, relative to that of the family."""
    made_from: str = "parent"
    """"parent", or the name of a member."""
    engine: str | None = None
    world_size: Count = 1
    seconds: dict[str, float] = {}
    """Wall time by the part of the work: factor, recover, evaluate."""

    # Of members that were made without training.
    factorizer: dict[str, Any] | None = None
    allocation: str | None = None

    @property
    def ppl(self) -> float | None:
        return self.eval.ppl if self.eval else None

    @property
    def ppl_factored(self) -> float | None:
        return self.eval_factored.ppl if self.eval_factored else None

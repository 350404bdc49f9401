"""The progress of a run, which a checkpoint stores beside its tensors."""

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pydantic

from plrd_train.family import Member
from plrd_train.recover.guard import Judged


@dataclass
class Counters:
    """Totals of the run: optimizer steps, skipped ones among them, tokens trained on, and these by domain; and the
    tokens of the present stage."""

    steps: int = 0
    skipped: int = 0
    tokens_total: int = 0
    tokens_stage: int = 0
    domain_tokens: dict[str, int] = field(default_factory=dict)

    def now(self) -> "Counters":
        """A copy, which later steps do not change."""
        return copy.deepcopy(self)


@dataclass(frozen=True)
class UnderWay:
    """An unfinished stage: its member so far (None: a parent that is trained from scratch), the ranks of its trunk, the
    steps done and their seconds, whether they have reached the branch, and the state of the guard."""

    entry: Member | None
    ranks: dict[str, int]
    steps: int = 0
    seconds: float = 0.0
    in_branch: bool = False
    judged: Judged = field(default_factory=Judged)


@dataclass(frozen=True)
class Progress:
    """`counters` and `position` (of the data loader) are those of this moment. The rest describes the end of the last
    of `stages` finished stages: `tokens_lineage` counts the tokens that the trunk's weights have seen, `ranks` are the
    trunk's, `entry` is the member of that stage, and `branched` says whether it is another model than the trunk.
    `under_way` is the next stage, if its training has begun."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")  # of the nested ones, too

    stages: int = 0
    counters: Counters = field(default_factory=Counters)
    position: dict[str, Any] | None = None
    tokens_lineage: int = 0
    ranks: dict[str, int] = field(default_factory=dict)
    entry: Member | None = None
    branched: bool = False
    under_way: UnderWay | None = None

    def to_json(self) -> str:
        return pydantic.TypeAdapter(Progress).dump_json(self, exclude_unset=True).decode()

    @classmethod
    def from_json(cls, text: str) -> "Progress":
        """Raises ValueError where `text` is not what `to_json` makes."""
        try:
            return pydantic.TypeAdapter(cls).validate_json(text, strict=True)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

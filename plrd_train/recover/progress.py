"""How far a run is: what a checkpoint says beside its tensors."""

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pydantic

from plrd_train.family import Member
from plrd_train.recover.guard import Judged


@dataclass
class Counters:
    """Counted over the whole run: optimizer steps, those of them that were left out, tokens trained on, and these by
    domain; and the tokens of the present stage."""

    steps: int = 0
    skipped: int = 0
    tokens_total: int = 0
    tokens_stage: int = 0
    domain_tokens: dict[str, int] = field(default_factory=dict)

    def now(self) -> "Counters":
        """A copy that no step changes."""
        return copy.deepcopy(self)


@dataclass(frozen=True)
class UnderWay:
    """The stage that trains: its member so far (None: a parent that is trained from scratch), the ranks of its trunk,
    the steps done, the seconds that they took, whether they have reached the branch, and what the guard made of
    them."""

    entry: Member | None
    ranks: dict[str, int]
    steps: int = 0
    seconds: float = 0.0
    in_branch: bool = False
    judged: Judged = field(default_factory=Judged)


@dataclass(frozen=True)
class Progress:
    """`counters` and `position` (the data loader's) stand at this moment; all else at the end of the last of `stages`
    finished stages: `tokens_lineage` are the tokens that the trunk's weights have seen, `ranks` says what the trunk is
    made of, `entry` is the member that the stage publishes, and `branched` whether that is not
    the trunk. `under_way` is the stage after it, if it has begun to train."""

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

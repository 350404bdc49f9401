"""How far a run is: what a checkpoint says beside its tensors."""

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import pydantic

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
    """The stage that trains: the family.json entry of its member so far, the ranks of its trunk, the steps done, the
    seconds that these took, and whether they have reached the branch, and what the guard made of them."""

    entry: dict[str, Any]
    ranks: dict[str, int]
    steps: int = 0
    seconds: float = 0.0
    in_branch: bool = False
    judged: Judged = field(default_factory=Judged)


@dataclass(frozen=True)
class Progress:
    """`counters` and `position` (the data loader's) stand at this moment; all else at the end of the last of `stages`
    finished stages: `tokens_lineage` are the tokens that the trunk's weights have seen, `ranks` says what the trunk is
    made of, `entry` is the family.json entry of the member that the stage publishes, and `branched` whether that is not
    the trunk. `under_way` is the stage after it, if it has begun to train."""

    stages: int = 0
    counters: Counters = field(default_factory=Counters)
    position: dict[str, Any] | None = None
    tokens_lineage: int = 0
    ranks: dict[str, int] = field(default_factory=dict)
    entry: dict[str, Any] | None = None
    branched: bool = False
    under_way: UnderWay | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Progress":
        """Raises ValueError, KeyError, TypeError or RecursionError where `text` is not what `to_json` makes."""
        source = json.loads(text)
        under_way = None
        if source["under_way"] is not None:
            under_way = UnderWay(**{**source["under_way"], "judged": Judged(**source["under_way"]["judged"])})
        progress = cls(**{**source, "counters": Counters(**source["counters"]), "under_way": under_way})
        try:
            pydantic.TypeAdapter(cls).validate_json(text, strict=True)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        for entry in (progress.entry, under_way and under_way.entry):
            if entry and not isinstance(entry.get("name"), str):
                raise ValueError("an entry has no name")
        return progress

"""The settings of `evaluation`."""

from typing import Annotated

from pydantic import Field

from plrd_train.settings import Positive, section


@section
class Evaluation:
    context: Annotated[Positive, Field(ge=2)]
    tokens: Positive
    batch: Positive
    prompt: str | None

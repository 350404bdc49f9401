"""The settings of `evaluation`."""

from typing import Annotated

from pydantic import Field

from plrd_train.settings import Positive, section


@section
class Evaluation:
    """Of perplexity (`plrd_train.evaluate.perplexity`). The keys `evaluation.NAME` are the settings of the further
    evaluator NAME, and stand in `Config.evaluators`."""

    context: Annotated[Positive, Field(ge=2)]
    tokens: Positive
    batch: Positive
    prompt: str | None

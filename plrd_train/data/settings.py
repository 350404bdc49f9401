"""The settings of `data`."""

from typing import Annotated

from pydantic import Field

from plrd_train.settings import Positive, section


@section
class Data:
    train: str
    validation: str
    revision: str | None
    seq_len: Annotated[Positive, Field(ge=2)]
    streams: Positive
    append_eos: bool
    skip_bad: bool
    embedded: bool  # write the text of the Python installation to the folder above `train` first

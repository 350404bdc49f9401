"""The types of settings. A component owns the dataclass of its settings; `plrd_train.config.schema` gathers and checks
them."""

from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True)


def section(cls: type) -> Any:
    """A frozen dataclass that validates its fields and refuses unknown ones."""
    return pydantic.dataclasses.dataclass(frozen=True, config=STRICT, kw_only=True)(cls)


def whole(value: Any) -> Any:
    """Token counts may be written 1e9: a float without a fraction counts as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(whole), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(whole), Field(ge=1)]
Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]

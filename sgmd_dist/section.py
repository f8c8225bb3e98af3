"""What every section of a recipe is: a frozen pydantic model with messages for people."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


def wrong(message: str) -> PydanticCustomError:
    """A validation error whose text is `message`; the loader adds file, key and value."""
    return PydanticCustomError("recipe", "{message}", {"message": message})


class Section(BaseModel):
    """A part of a recipe: frozen, every key known, every default valid, every number finite.

    A field's `description`, where it has one, says what its value must be: messages show it after "expected".
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans where pydantic would read them as 1 and 0."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if annotation is not bool and bool not in get_args(annotation):
                raise PydanticCustomError("bool", "not a boolean")
        return value

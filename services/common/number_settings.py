"""Settings in which true and false are no numbers. Pydantic reads them as 1 and 0, which hides a slip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class NumberSettings(BaseModel):
    """Base class of settings. Where a number is expected, alone or in a list, true and false are refused."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name is not None and (
            said := number_problem(value, cls.model_fields[info.field_name].annotation)
        ):
            raise PydanticCustomError("no_number", "{said}", {"said": said})
        return value


def number_problem(value: Any, annotation: Any) -> str:
    """What is wrong where true or false is given, alone or in a list, and the annotation expects numbers; "" if nothing
    is."""
    values = value if isinstance(value, list | tuple) else (value,)
    found = next((one for one in values if isinstance(one, bool)), None)
    if found is None:
        return ""
    kinds = list(_kinds(annotation))
    takes_it = any(kind is bool or kind is Any or isinstance(kind, bool) for kind in kinds)
    return "" if takes_it or not (int in kinds or float in kinds) else f"expected a number, got {str(found).lower()}"


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)

"""Base class of config sections, and the types of their fields."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from vit_static.common.errors import format_value
from vit_static.config.yaml_loader import WrittenFloat, WrittenInt

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FractionRange = tuple[Fraction, Fraction]  # min, max
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Range = tuple[PositiveFloat, PositiveFloat]  # min, max
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
Level = Annotated[int, Field(ge=0, le=255)]  # of a colour
Pixels = Annotated[int, Field(ge=1, le=100_000)]
CropPct = Annotated[float, Field(ge=0.05, le=1.0)]  # a smaller one would resize images to hundreds of megapixels


def _square_if_single(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


ImageSize = Annotated[tuple[Pixels, Pixels], BeforeValidator(_square_if_single)]  # height, width


def _tuple_if_single(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _check_num_channels(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) not in (1, 3):
        raise ValueError(f"{list(values)} must be three values for RGB, or one for greyscale (model.num_channels=1)")
    return values


# One value for greyscale or three for RGB
PerChannel = Annotated[tuple[float, ...], BeforeValidator(_tuple_if_single), AfterValidator(_check_num_channels)]
PositivePerChannel = Annotated[
    tuple[PositiveFloat, ...], BeforeValidator(_tuple_if_single), AfterValidator(_check_num_channels)
]

_MAX_NAME_BYTES = 200  # file systems allow 255, and temporary names are longer than the name


def _check_run_name(name: str) -> str:
    """Refuse a name that isn't a single folder inside `output_dir`."""
    if not name or "/" in name or "\\" in name or not (name[0].isalnum() or name[0] == "_"):
        raise ValueError(
            f"{format_value(name)} isn't a folder name: it must start with a letter, a digit or _ and have no slash; "
            "set name=NAME"
        )
    if len(os.fsencode(name)) > _MAX_NAME_BYTES:
        raise ValueError(f"{format_value(name)} is too long for a folder name; set name=NAME")
    return name


RunName = Annotated[str, AfterValidator(_check_run_name)]

UNEXPECTED_BOOL = "unexpected_bool"  # type of the error of true or false where something else is expected


def choices_of(annotation: Any) -> list[str]:
    """Return the texts that a field accepts as its value, or as an item of it, if its annotation lists them."""
    if get_origin(annotation) is Literal:
        return [each for each in get_args(annotation) if isinstance(each, str)]
    return [choice for each in get_args(annotation) for choice in choices_of(each)]


class Section(BaseModel):
    """A part of the config. It is frozen, and refuses undeclared keys, infinities and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise PydanticCustomError(UNEXPECTED_BOOL, "must not be true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _ignore_case_of_choices(cls, value: Any, info: ValidationInfo) -> Any:
        choices = {each.lower(): each for each in choices_of(cls.model_fields[str(info.field_name)].annotation)}

        def as_listed(item: Any) -> Any:
            return choices.get(item.lower(), item) if isinstance(item, str) else item

        return [as_listed(item) for item in value] if isinstance(value, list) else as_listed(value)

    @field_validator("*", mode="before")
    @classmethod
    def _check_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept a number where text is expected, exactly as it was written; refuse text that no file name can hold."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, WrittenInt | WrittenFloat) and (annotation is str or str in get_args(annotation)):
            value = value.text
        if isinstance(value, str):
            try:
                os.fsencode(value)
            except UnicodeEncodeError:
                raise ValueError(f"{value!a} is not valid text") from None
            if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in value):
                raise ValueError(f"{format_value(value)} contains a control character")
        return value

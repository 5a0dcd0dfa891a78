"""Record of the whole model in a weight file that this program writes, for what the arrays don't determine.

It is the config's `model` section as JSON: in a .safetensors file's metadata, as an array of bytes in an .npz file, and
after the end of the pickle in a .pdparams file. Other programs' readers don't see it there or leave it out.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from vit_static.common.errors import WeightsError, newer_format, truncate
from vit_static.config.model_schema import ModelConfig

RECORD_FORMAT = 1  # without a number in the record, it is 1
RECORD_NAME = "vit_static_model"  # key of the metadata, and name of the array
_MARK = f"\n{RECORD_NAME}: ".encode()  # before the JSON that follows a pickle
MAX_RECORD_BYTES = 2**16


def encode_record(model: ModelConfig) -> str:
    """Return the record's JSON in one line."""
    return json.dumps({"format": RECORD_FORMAT, **model.model_dump(mode="json")}, sort_keys=True)


def decode_record(text: str | bytes, source: str) -> ModelConfig:
    """Return the recorded model. Raises WeightsError, with the source, if it is damaged or of a newer format."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        if newer := newer_format(values.pop("format", None), RECORD_FORMAT):
            raise WeightsError(
                f"{source}: its record of the model {newer}; use that version, or convert the original "
                "weights again with this one"
            )
        text = json.dumps(values)
    try:
        return ModelConfig.model_validate_json(text)
    except ValidationError as error:
        mistake = error.errors(include_input=False, include_url=False)[0]
        key = truncate(".".join(map(str, mistake["loc"]))) or "all of it"
        raise WeightsError(
            f"{source}: its record of the model can't be read ({key}: {truncate(mistake['msg'], 80)}); convert the "
            "original weights again with this version"
        ) from None


def record_after_pickle(model: ModelConfig) -> bytes:
    """Return what is appended to a pickle: readers of pickles stop at its end."""
    return _MARK + encode_record(model).encode() + b"\n"


def find_record_after_pickle(rest: bytes) -> bytes | None:
    """Return the JSON in what follows a pickle; None if it isn't a record."""
    return rest.removeprefix(_MARK) if rest.startswith(_MARK) else None


def record_in_metadata(metadata: Any) -> str | None:
    """Return the JSON in the metadata of a .safetensors file, if there is one."""
    record = metadata.get(RECORD_NAME) if isinstance(metadata, dict) else None
    return record if isinstance(record, str) and len(record) <= MAX_RECORD_BYTES else None

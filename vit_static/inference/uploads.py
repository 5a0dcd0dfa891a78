"""Images in the bodies of requests: one image file, a form, or JSON with images in base64."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header
from pydantic import BaseModel, ConfigDict, ValidationError

from vit_static.common.errors import PredictError, escape, truncate

_MAX_JSON_ITEMS = 1000  # of a body with images: lists, objects and their entries
_MAX_NAME_LENGTH = 200  # of a file's name in an answer


@dataclass(frozen=True)
class UploadedImage:
    """An image file from a request: its bytes, and the name that a form gives it."""

    content: bytes | bytearray
    label: str  # for messages
    name: str | None = None


@dataclass(frozen=True)
class Upload:
    """The images of a request; `is_list` if its form can hold several, even if it holds one."""

    images: list[UploadedImage]
    is_list: bool


class _ImagesBody(BaseModel):
    """JSON body with images."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[str]  # base64, with or without the start of a data URL


def read_upload(body: bytearray, headers: Mapping[str, str], max_images: int) -> Upload:
    """Return the images of a body: a form (multipart/form-data), JSON (application/json), or else an image file.

    Raises PredictError for a form or JSON that can't be read, or that has no images or more than `max_images`.
    """
    media_type, options = parse_options_header(headers.get("content-type", ""))
    if media_type == "multipart/form-data":
        named = _read_form(body, options.get("boundary", ""), max_images)
    elif media_type == "application/json":
        named = [(None, content) for content in _read_json(body, max_images)]
    else:
        _check_is_image(body)
        return Upload([UploadedImage(body, "the image")], is_list=False)
    if not named:
        raise PredictError("the request has no images; send at least one")
    images = []
    for number, (name, content) in enumerate(named, start=1):
        label = f"image {number} of {len(named)}" + (f" ({escape(name)})" if name else "")
        images.append(UploadedImage(content, label, name))
    return Upload(images, is_list=True)


def _check_is_image(body: bytearray) -> None:
    """Raise PredictError for a form or JSON that comes without its Content-Type. No image format begins so."""
    beginning = bytes(body[:100]).lstrip()
    if beginning.startswith((b"{", b'["', b"[{")):
        raise PredictError('the body looks like JSON; send it with the header "Content-Type: application/json"')
    if beginning.startswith(b"--") and b"ontent-" in body[:500]:
        raise PredictError(
            'the body looks like a form; send it with the header "Content-Type: multipart/form-data; boundary=..."'
        )


def _read_form(body: bytearray, boundary: str, max_images: int) -> list[tuple[str | None, bytes]]:
    """Return the names and contents of a form's files."""
    files: list[tuple[str | None, bytes]] = []
    content = bytearray()
    segment: MultipartSegment | None = None
    try:
        with PushMultipartParser(boundary, max_segment_count=max_images + 1, strict=True) as parser:
            for event in parser.parse(body):
                if isinstance(event, MultipartSegment):
                    if event.filename is None:
                        field = escape(truncate(event.name))
                        raise PredictError(f"the form's field {field} is not a file; settings belong into the URL")
                    if len(files) == max_images:
                        raise _too_many(max_images)
                    segment = event
                elif event is not None:
                    content += event
                elif segment is not None:
                    files.append((truncate(segment.filename or "", _MAX_NAME_LENGTH) or None, bytes(content)))
                    content = bytearray()
    except MultipartError as error:
        raise PredictError(f"the body is not a valid form ({truncate(str(error))})") from None
    return files


def _read_json(body: bytearray, max_images: int) -> list[bytes]:
    """Return the images of a JSON body: {"images": [base64, ...]}."""
    values = load_json(body, max_items=_MAX_JSON_ITEMS)
    try:
        texts = _ImagesBody.model_validate(values).images
    except ValidationError as error:
        has_settings = "images" in values and error.errors()[0]["type"] == "extra_forbidden"
        hint = "; settings belong into the URL: ?top_k=3" if has_settings else ""
        raise PredictError(f'{describe_mistake(error)}; send {{"images": [BASE64, ...]}}{hint}') from None
    if len(texts) > max_images:
        raise _too_many(max_images)
    return [decode_base64(text, f"image {number} of {len(texts)}") for number, text in enumerate(texts, start=1)]


def decode_base64(text: str, label: str) -> bytes:
    """Decode base64, with or without the start of a data URL. Raises PredictError, with `label`, for anything else."""
    start, comma, _ = text[:100].partition(",")
    if comma and start.startswith("data:") and start.endswith(";base64"):
        text = text[len(start) + 1 :]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PredictError(f"{label}: is not base64 ({error})") from None


def _too_many(max_images: int) -> PredictError:
    return PredictError(f"the request has more than {max_images} images; send them in several requests")


def load_json(body: bytes | bytearray, *, max_items: int) -> Any:
    """Parse JSON that has about `max_items` values at most.

    They are counted before they are parsed, because a small text can have values that need 150 times its memory, and
    minutes in which nothing else runs. Raises PredictError for text that isn't JSON or has more values.
    """
    if body.count(b",") + body.count(b"[") + body.count(b"{") > max_items:
        raise PredictError(f"the JSON has more than {max_items} values")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not allowed")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else truncate(str(error))
        raise PredictError(f"the body is not valid JSON ({reason})") from None


def describe_mistake(error: ValidationError) -> str:
    """Return the first mistake in a JSON body in one line."""
    mistake = error.errors(include_input=False, include_url=False)[0]
    key = escape(truncate(".".join(map(str, mistake["loc"])))) or "the JSON"
    return f"{key}: {truncate(mistake['msg']).lower()}"

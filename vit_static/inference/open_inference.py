"""Messages of the Open Inference Protocol, version 2, with its extension for binary tensors.

The protocol is KServe's: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md; the
extension is Triton's: github.com/triton-inference-server/server, docs/protocol/extension_binary_data.md. A server has
two models: one takes the tensor that the exported program takes, the other, whose name ends with _files, image files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vit_static.common.errors import PredictError, escape, truncate
from vit_static.inference.uploads import UploadedImage, decode_base64, describe_mistake, load_json

HEADER_LENGTH = "Inference-Header-Content-Length"  # bytes of JSON before the binary tensors
VERSION = "1"  # of every model
FILES_SUFFIX = "_files"
TENSOR_INPUT, FILES_INPUT = "images", "files"
OUTPUTS = ("logits", "probabilities")
_MAX_JSON_ITEMS = 1_000_000  # numbers of a tensor in JSON, which take about 0.2 s to parse


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _TensorParameters(_Message):
    binary_data_size: Annotated[int, Field(ge=0)] | None = None


class _Tensor(_Message):
    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=8)]
    datatype: str
    parameters: _TensorParameters = _TensorParameters()
    data: list[Any] | None = None


class _OutputParameters(_Message):
    binary_data: bool | None = None


class _RequestedOutput(_Message):
    name: Literal["logits", "probabilities"]
    parameters: _OutputParameters = _OutputParameters()


class _RequestParameters(_Message):
    binary_data_output: bool = False


class _InferRequest(_Message):
    id: str | None = None
    # KServe's client also sends these two; the URL decides.
    model_name: str | None = None
    model_version: str | None = None
    parameters: _RequestParameters = _RequestParameters()
    inputs: Annotated[list[_Tensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[_RequestedOutput], Field(max_length=len(OUTPUTS))] = []


@dataclass(frozen=True)
class InferRequest:
    """A request: preprocessed images [B, channels, height, width] float32, or image files; and what it asks for."""

    id: str | None
    inputs: np.ndarray | list[UploadedImage]
    outputs: dict[str, bool]  # by name: whether in binary


def model_metadata(name: str, input_shape: Sequence[int], num_classes: int, platform: str) -> dict[str, Any]:
    """Return the metadata of a model; `input_shape` is that of the tensor without the batch, () for image files."""
    if input_shape:
        model_input = {"name": TENSOR_INPUT, "datatype": "FP32", "shape": [-1, *input_shape]}
    else:
        model_input = {"name": FILES_INPUT, "datatype": "BYTES", "shape": [-1]}
    outputs = [{"name": output, "datatype": "FP32", "shape": [-1, num_classes]} for output in OUTPUTS]
    return {"name": name, "versions": [VERSION], "platform": platform, "inputs": [model_input], "outputs": outputs}


def read_infer_request(
    body: bytearray, headers: Mapping[str, str], input_shape: Sequence[int], max_images: int
) -> InferRequest:
    """Return a request for the model whose metadata have `input_shape`.

    In JSON, numbers may be nested or in one list (row-major), and image files are in base64. Raises PredictError for a
    request that doesn't fit the protocol or the model, or that has more than `max_images` images.
    """
    length = headers.get(HEADER_LENGTH.lower(), str(len(body)))
    if not (length.isascii() and length.isdecimal() and int(length[:20]) <= len(body)):
        raise PredictError(f"{HEADER_LENGTH}: {escape(truncate(length, 40))} is not a number of bytes of the body")
    binary = memoryview(body)[int(length) :]
    values = load_json(bytes(body[: int(length)]), max_items=_MAX_JSON_ITEMS)
    try:
        request = _InferRequest.model_validate(values)
    except ValidationError as error:
        raise PredictError(describe_mistake(error)) from None
    (tensor,) = request.inputs
    name, datatype = (TENSOR_INPUT, "FP32") if input_shape else (FILES_INPUT, "BYTES")
    if (tensor.name, tensor.datatype, tensor.shape[1:]) != (name, datatype, list(input_shape)) or not tensor.shape:
        raise PredictError(
            f"the input is {escape(truncate(tensor.name))} {escape(truncate(tensor.datatype))} {tensor.shape}, and the "
            f"model takes {name} {datatype} {[-1, *input_shape]}"
        )
    if not 1 <= tensor.shape[0] <= max_images:
        raise PredictError(f"the request has {tensor.shape[0]} images; send 1 to {max_images}")
    inputs = _read_tensor(tensor, binary) if input_shape else _read_files(tensor, binary)
    default = request.parameters.binary_data_output
    chosen: dict[str, bool] = {
        output.name: default if output.parameters.binary_data is None else output.parameters.binary_data
        for output in request.outputs
    }
    return InferRequest(request.id, inputs, chosen or dict.fromkeys(OUTPUTS, default))


def _binary_part(tensor: _Tensor, binary: memoryview) -> memoryview | None:
    """Return the bytes of a binary tensor, None for one in JSON. Raises PredictError if they aren't all there is."""
    num_bytes = tensor.parameters.binary_data_size
    if (num_bytes is None) == (tensor.data is None):
        raise PredictError("the input needs either data or the parameter binary_data_size")
    if len(binary) != (num_bytes or 0):
        raise PredictError(f"{len(binary)} bytes follow the JSON, and the input has {num_bytes or 0} binary ones")
    return None if num_bytes is None else binary


def _read_tensor(tensor: _Tensor, binary: memoryview) -> np.ndarray:
    part = _binary_part(tensor, binary)
    try:
        if part is not None:
            values = np.frombuffer(part, "<f4").astype(np.float32)
        else:
            values = np.asarray(tensor.data)
            if values.dtype.kind not in "if":
                raise ValueError("it has values that are not numbers, or lists of different lengths")
            values = values.astype(np.float32)
        values = values.reshape(tensor.shape)
    except (ValueError, OverflowError) as error:
        raise PredictError(f"the input's data don't fit its shape {tensor.shape} ({truncate(str(error))})") from None
    if not np.isfinite(values).all():
        raise PredictError("the input has NaN or infinite values")
    return values


def _read_files(tensor: _Tensor, binary: memoryview) -> list[UploadedImage]:
    part = _binary_part(tensor, binary)
    num_files = tensor.shape[0]
    labels = [f"file {number} of {num_files}" for number in range(1, num_files + 1)]
    if part is not None:
        contents = _split_bytes(part, num_files)
    else:
        texts = tensor.data or []
        if len(texts) != num_files or not all(isinstance(text, str) for text in texts):
            raise PredictError(f"the input's data must be {num_files} base64 strings, one per file")
        contents = [decode_base64(text, label) for text, label in zip(texts, labels, strict=True)]
    return [UploadedImage(content, label) for content, label in zip(contents, labels, strict=True)]


def _split_bytes(part: memoryview, num_elements: int) -> list[bytes]:
    """Return the elements of a binary BYTES tensor, each after its length in 4 bytes, little-endian.

    Raises PredictError unless they are `num_elements` that end where the part ends.
    """
    elements, offset = [], 0
    for _ in range(num_elements):
        start = offset + 4
        length = struct.unpack("<I", part[offset:start])[0] if start <= len(part) else 0
        elements.append(bytes(part[start : start + length]))
        offset = start + length
    if offset != len(part):
        raise PredictError(f"the input's binary data don't have the {num_elements} files of its shape")
    return elements


def infer_response(
    model_name: str, request: InferRequest, outputs: Mapping[str, np.ndarray]
) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of a response with the requested ones of `outputs`, each float32."""
    described, parts = [], []
    for name, is_binary in request.outputs.items():
        values = np.ascontiguousarray(outputs[name], "<f4")
        entry: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(values.shape)}
        if is_binary:
            parts.append(values.tobytes())
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = values.ravel().tolist()
        described.append(entry)
    message = {"model_name": model_name, "model_version": VERSION, "outputs": described}
    if request.id is not None:
        message["id"] = request.id
    text = json.dumps(message).encode()
    if not parts:
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join((text, *parts)), headers

"""Arrays in weight files: .pdparams (pickles), .npz and .safetensors, detected by their first bytes."""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors

from vit_static.common.errors import WeightsError, os_reason, truncate
from vit_static.config.model_schema import ModelConfig
from vit_static.weights.model_record import (
    MAX_RECORD_BYTES,
    RECORD_NAME,
    decode_record,
    find_record_after_pickle,
    record_in_metadata,
)
from vit_static.weights.unpickler import ForbiddenName, PickledArray, load_pickle

Arrays = dict[str, np.ndarray | None]  # by the names in the file; None if it isn't an array of floating-point numbers
Container = Literal["paddle", "npz", "safetensors"]

_TORCH = (
    "is PyTorch's own file, which is a pickle that can run code; if you trust it, save it again with "
    "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
)
_MAX_NAME_LENGTH, _MAX_AXES = 200, 8
_MAX_EXPANSION = 100  # of a zip file; weights hardly compress
# Names under which a pickle holds state dicts, beside the optimizer and the epoch, in the order of preference.
# Self-distillation (DINO, iBOT) evaluates its teacher.
STATE_DICTS = ("state_dict", "model", "model_state_dict", "model_state", "net", "params", "teacher")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_MAX_NESTED = 3


@dataclass
class FileContent:
    """Arrays of a weight file as float32, and the rest of what it says."""

    container: Container
    arrays: Arrays
    model: ModelConfig | None = None  # recorded by this program
    outside: list[str] = field(default_factory=list)  # names beside the state dict in the file, such as "optimizer"


def read_arrays(path: Path, *, ema: bool = False) -> FileContent:
    """Read a file's arrays. Never runs code from the file.

    A state dict inside another dict is found by its name (STATE_DICTS, or AVERAGES with `ema`). Raises WeightsError if
    the file is none of the three kinds, is damaged, holds infinities, NaN or impossible arrays, or has no average.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(16)
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({os_reason(error)})") from None
    content = _read(path, beginning, ema=ema)
    for name, array in content.arrays.items():
        if len(name) > _MAX_NAME_LENGTH:
            raise WeightsError(f"{path}: has an array with a name of {len(name)} characters, {truncate(ascii(name))}")
        if not name or not name.isprintable():
            raise WeightsError(f"{path}: has an array whose name isn't printable text, {name!a}")
        if array is not None and array.ndim > _MAX_AXES:
            raise WeightsError(f"{path}: {name} has {array.ndim} axes, which no array of weights has")
        if array is not None and not np.isfinite(array).all():
            raise WeightsError(f"{path}: {name} holds infinities or NaN; use weights from before training diverged")
    return content


def _read(path: Path, beginning: bytes, *, ema: bool) -> FileContent:
    is_safetensors = len(beginning) == 16 and beginning[8:9] == b"{" and struct.unpack("<Q", beginning[:8])[0] < 10**8
    if is_safetensors or beginning[:2] == b"PK":
        if ema:
            raise WeightsError(f"{path}: holds one set of weights, and no moving average of them; leave --ema out")
        return _read_safetensors(path) if is_safetensors else _read_npz(path)
    if beginning[:1] == b"\x80":
        return _read_pickle(path, ema=ema)
    raise WeightsError(f"{path}: is no weight file of a known format; use a .pdparams, .npz or .safetensors file")


def _describe(error: Exception) -> str:
    """Return a library's error about a damaged file, shortened: its message may contain the whole file."""
    return f"{type(error).__name__}: {truncate(str(error), 150)}"


def _float32(array: np.ndarray, dtype: str = "") -> np.ndarray | None:
    """Convert floating-point numbers of any kind; None for other arrays. bfloat16 arrives as its 16 bits."""
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(np.float32)
    if dtype == "BF16" or array.dtype in (np.dtype("V2"), np.dtype("uint16")):
        return (np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return None


def _read_npz(path: Path) -> FileContent:
    arrays: Arrays = {}
    model = None
    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = sum(member.file_size for member in archive.infolist())
            if num_bytes > _MAX_EXPANSION * max(path.stat().st_size, 10**6):
                raise WeightsError(f"{path}: would expand to {num_bytes / 1e9:.1f} GB, which weights never do")
            if any(name.endswith("data.pkl") for name in archive.namelist()):
                raise WeightsError(f"{path}: {_TORCH}")
        with np.load(path, allow_pickle=False) as members:
            for name in members.files:
                array = members[name]
                if name == RECORD_NAME and isinstance(array, np.ndarray) and array.dtype == np.uint8:
                    model = decode_record(array.tobytes(), str(path))
                    continue
                arrays[name] = _float32(array) if isinstance(array, np.ndarray) else None
    except WeightsError:
        raise
    except Exception as error:  # a damaged zip or header can raise anything
        raise WeightsError(f"{path}: is a damaged .npz file ({_describe(error)})") from None
    return FileContent("npz", arrays, model)


def _read_safetensors(path: Path) -> FileContent:
    arrays: Arrays = {}
    try:
        content = path.read_bytes()
        for name, tensor in safetensors.deserialize(content):
            dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(tensor["dtype"])
            arrays[name] = None
            if dtype is not None:
                array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
                arrays[name] = _float32(array, tensor["dtype"])
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    except Exception as error:
        raise WeightsError(f"{path}: is a damaged .safetensors file ({_describe(error)})") from None
    record = record_in_metadata(header.get("__metadata__"))
    return FileContent("safetensors", arrays, None if record is None else decode_record(record, str(path)))


_BOOKKEEPING = "StructuredToParameterName@@"  # an entry that paddle.save adds
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first, before it wrote zip files


def _read_pickle(path: Path, *, ema: bool) -> FileContent:
    try:
        with path.open("rb") as file:
            content = load_pickle(file)
            record = find_record_after_pickle(file.read(MAX_RECORD_BYTES))
    except ForbiddenName as error:
        if error.module.partition(".")[0] == "torch":
            raise WeightsError(f"{path}: {_TORCH}") from None
        raise WeightsError(f"{path}: is not a Paddle state dict ({truncate(str(error), 150)})") from None
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({os_reason(error)})") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise WeightsError(f"{path}: is not a Paddle state dict ({_describe(error)})") from None
    if isinstance(content, int) and content == _TORCH_MAGIC:
        raise WeightsError(f"{path}: {_TORCH}")
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state dict")
    state_dict, outside = _find_state_dict(content, path, ema=ema)
    arrays: Arrays = {}
    for name, value in state_dict.items():
        if isinstance(name, str) and name != _BOOKKEEPING:
            try:
                array = _pickled_array(value)
            except ValueError:
                raise WeightsError(f"{path}: the content of {name} doesn't fit its shape") from None
            arrays[name] = None if array is None else _float32(array)
    return FileContent("paddle", arrays, None if record is None else decode_record(record, str(path)), outside)


def _pickled_array(value: Any) -> np.ndarray | None:
    """Return the array in an entry of a state dict, if there is one: a pickled Tensor is a tuple of name and data."""
    pickled = value[1] if isinstance(value, tuple) and len(value) == 2 else value
    return pickled.to_numpy() if isinstance(pickled, PickledArray) else None


def _find_state_dict(content: dict[Any, Any], path: Path, *, ema: bool) -> tuple[dict[Any, Any], list[str]]:
    """Return the state dict in a pickle, which may be inside other dicts, and the names of what is beside it.

    Raises WeightsError if `ema` asks for a moving average that the file doesn't have.
    """
    outside: list[str] = []
    has_average = False
    for _ in range(_MAX_NESTED):
        nested = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, dict)}
        wanted = AVERAGES if ema and not has_average else STATE_DICTS
        chosen = next((name for name in wanted if nested.get(name)), None)
        if chosen is None:
            break
        has_average = has_average or chosen in AVERAGES
        outside += [name for name in content if isinstance(name, str) and name != chosen]
        content = content[chosen]
    if ema and not has_average:
        raise WeightsError(f"{path}: holds no moving average of the weights ({', '.join(AVERAGES)}); leave --ema out")
    return content, outside

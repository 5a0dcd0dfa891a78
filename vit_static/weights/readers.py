"""Arrays in weight files: .pdparams (pickles), .npz and .safetensors, detected by their first bytes."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors

from vit_static.common.errors import WeightsError, truncate
from vit_static.weights.unpickler import ForbiddenName, PickledArray, load_pickle

Arrays = dict[str, np.ndarray | None]  # by the names in the file; None if it isn't an array of floating-point numbers
Container = Literal["paddle", "npz", "safetensors"]

_TORCH = (
    "is PyTorch's own file, which is a pickle that can run code; if you trust it, save it again with "
    "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
)
_MAX_NAME_LENGTH, _MAX_AXES = 200, 8
_MAX_EXPANSION = 100  # of a zip file; weights hardly compress


def read_arrays(path: Path) -> tuple[Container, Arrays]:
    """Return a file's kind and its arrays as float32. Never runs code from the file.

    Raises WeightsError if it is none of the three kinds, is damaged, or holds infinities, NaN or impossible arrays.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(16)
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror})") from None
    kind, arrays = _read(path, beginning)
    for name, array in arrays.items():
        if len(name) > _MAX_NAME_LENGTH:
            raise WeightsError(f"{path}: has an array with a name of {len(name)} characters, {truncate(ascii(name))}")
        if not name or not name.isprintable():
            raise WeightsError(f"{path}: has an array whose name isn't printable text, {name!a}")
        if array is not None and array.ndim > _MAX_AXES:
            raise WeightsError(f"{path}: {name} has {array.ndim} axes, which no array of weights has")
        if array is not None and not np.isfinite(array).all():
            raise WeightsError(f"{path}: {name} holds infinities or NaN; use weights from before training diverged")
    return kind, arrays


def _read(path: Path, beginning: bytes) -> tuple[Container, Arrays]:
    if beginning[:2] == b"PK":
        return "npz", _read_npz(path)
    if len(beginning) == 16 and beginning[8:9] == b"{" and struct.unpack("<Q", beginning[:8])[0] < 10**8:
        return "safetensors", _read_safetensors(path)
    if beginning[:1] == b"\x80":
        return "paddle", _read_pickle(path)
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


def _read_npz(path: Path) -> Arrays:
    arrays: Arrays = {}
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
                arrays[name] = _float32(array) if isinstance(array, np.ndarray) else None
    except WeightsError:
        raise
    except Exception as error:  # a damaged zip or header can raise anything
        raise WeightsError(f"{path}: is a damaged .npz file ({_describe(error)})") from None
    return arrays


def _read_safetensors(path: Path) -> Arrays:
    arrays: Arrays = {}
    try:
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(tensor["dtype"])
            arrays[name] = None
            if dtype is not None:
                array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
                arrays[name] = _float32(array, tensor["dtype"])
    except Exception as error:
        raise WeightsError(f"{path}: is a damaged .safetensors file ({_describe(error)})") from None
    return arrays


_BOOKKEEPING = "StructuredToParameterName@@"  # an entry that paddle.save adds
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first, before it wrote zip files


def _read_pickle(path: Path) -> Arrays:
    try:
        with path.open("rb") as file:
            content = load_pickle(file)
    except ForbiddenName as error:
        if error.module.partition(".")[0] == "torch":
            raise WeightsError(f"{path}: {_TORCH}") from None
        raise WeightsError(f"{path}: is not a Paddle state dict ({truncate(str(error), 150)})") from None
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise WeightsError(f"{path}: is not a Paddle state dict ({_describe(error)})") from None
    if isinstance(content, int) and content == _TORCH_MAGIC:
        raise WeightsError(f"{path}: {_TORCH}")
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state dict")
    arrays: Arrays = {}
    for name, value in content.items():
        pickled = value[1] if isinstance(value, tuple) and len(value) == 2 else value  # a pickled Tensor: name, data
        if isinstance(name, str) and name != _BOOKKEEPING:
            try:
                array = pickled.to_numpy() if isinstance(pickled, PickledArray) else None
            except ValueError:
                raise WeightsError(f"{path}: the content of {name} doesn't fit its shape") from None
            arrays[name] = None if array is None else _float32(array)
    return arrays

"""The arrays in files of weights: pickles, .npz and .safetensors, told by their first bytes. Nothing is unpickled but
arrays."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import safetensors

from vit_static.common.errors import WeightsError, truncate

Arrays = dict[str, np.ndarray | None]  # as a file has them; None for what is no array of numbers with fractions
Kind = Literal["paddle", "npz", "safetensors"]


_TORCH = (
    "is PyTorch's own file, which is a pickle that can run code: write it anew with safetensors.torch.save_file("
    "model.state_dict(), 'model.safetensors'), where you trust it"
)


def read_arrays(path: Path) -> tuple[Kind, Arrays]:
    """A file's arrays, as float32. Raises WeightsError for what is none of the three. Never runs code from it."""
    try:
        with path.open("rb") as file:
            beginning = file.read(16)
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror})") from None
    kind, arrays = _read(path, beginning)
    for name, array in arrays.items():
        if not name or not name.isprintable() or len(name) > _MAX_NAME_LENGTH:
            what = "no text" if len(name) <= _MAX_NAME_LENGTH else f"{len(name)} letters long"
            raise WeightsError(f"{path}: has an array whose name is {what}, {truncate(ascii(name))}")
        if array is not None and array.ndim > _MAX_AXES:
            raise WeightsError(f"{path}: {name} has {array.ndim} axes, which no array of weights has")
        if array is not None and not np.isfinite(array).all():
            raise WeightsError(f"{path}: {name} holds infinities or what is no number: these weights are broken")
    return kind, arrays


_MAX_NAME_LENGTH, _MAX_AXES = 200, 8


def _because(error: Exception) -> str:
    """What a library says of a broken file, which may be all of the file."""
    return f"{type(error).__name__}: {truncate(str(error), 150)}"


def _read(path: Path, beginning: bytes) -> tuple[Kind, Arrays]:
    if beginning[:2] == b"PK":
        return "npz", _read_npz(path)
    if len(beginning) == 16 and beginning[8:9] == b"{" and struct.unpack("<Q", beginning[:8])[0] < 10**8:
        return "safetensors", _read_safetensors(path)
    if beginning[:1] == b"\x80":
        return "paddle", _read_pickle(path)
    raise WeightsError(f"{path}: is no file of weights that is known here: .pdparams, .npz and .safetensors are")


def _float32(array: np.ndarray, dtype: str = "") -> np.ndarray | None:
    """None for what is no number with a fraction. bfloat16 comes as its 16 bits."""
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(np.float32)
    if dtype == "BF16" or array.dtype in (np.dtype("V2"), np.dtype("uint16")):
        return (np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return None


_MAX_UNPACKED_BYTES = 100  # times a zip file's own size; weights hardly shrink


def _read_npz(path: Path) -> Arrays:
    arrays: Arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > _MAX_UNPACKED_BYTES * max(path.stat().st_size, 10**6):
                raise WeightsError(f"{path}: would unpack to {unpacked / 1e9:.1f} GB, which no weights do")
            if any(name.endswith("data.pkl") for name in archive.namelist()):
                raise WeightsError(f"{path}: {_TORCH}")
        with np.load(path, allow_pickle=False) as found:
            for name in found.files:
                array = found[name]
                arrays[name] = _float32(array) if isinstance(array, np.ndarray) else None
    except WeightsError:
        raise
    except Exception as error:  # a broken zip or header can raise anything
        raise WeightsError(f"{path}: is not a whole .npz file ({_because(error)})") from None
    return arrays


def _read_safetensors(path: Path) -> Arrays:
    arrays: Arrays = {}
    try:
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(tensor["dtype"])
            arrays[name] = None
            if kind is not None:
                array = np.frombuffer(tensor["data"], kind).reshape(tensor["shape"])
                arrays[name] = _float32(array, tensor["dtype"])
    except Exception as error:
        raise WeightsError(f"{path}: is not a whole .safetensors file ({_because(error)})") from None
    return arrays


class _Dtype:
    """Stands in for NumPy's while a pickle is read: keeps what it is told, and does nothing."""

    def __init__(self, kind: Any = None, *_: Any) -> None:
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = "<" if state[1] in ("|", "=") else state[1]


class _Array:
    """Stands in for an array: its state, of which one is made only if all of it is as it should be."""

    def __init__(self, *_: Any) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def array(self) -> np.ndarray | None:
        """None for what is no array of numbers in two to eight bytes."""
        if not isinstance(self._state, tuple) or len(self._state) != 5:
            return None
        _, shape, dtype, is_fortran, content = self._state
        if not isinstance(dtype, _Dtype) or dtype.kind not in ("f2", "f4", "f8", "u2", "i4", "i8"):
            return None
        if not isinstance(content, bytes) or not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
            return None
        return np.frombuffer(content, f"{dtype.order}{dtype.kind}").reshape(shape, order="F" if is_fortran else "C")


def _ordered_dict(items: Any = ()) -> OrderedDict[Any, Any]:
    """Stands in for OrderedDict, whose keys would be hashed before anyone looks at them."""
    _refuse_keys([key for key, _ in items])
    return OrderedDict(items)


def _refuse_keys(keys: list[Any]) -> None:
    """Texts and numbers alone: the hash of tuples in tuples, each twice the one before it, takes for ever."""
    for key in keys:
        if type(key) not in (str, int, bytes):
            raise pickle.UnpicklingError(f"it has a {type(key).__name__} for a name")


# What a state dict of arrays needs to be unpickled; whatever else a file asks for is refused.
_HARMLESS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


_READ: dict[int, Any] = pickle._Unpickler.dispatch  # what Python's own does, by opcode


class _StateUnpickler(pickle._Unpickler):
    """Reads containers and what stands in for arrays; refuses everything that could run code.

    Python's own, not the quicker one in C, which makes room for as many objects as nine bytes say that there are.
    """

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "torch":
            raise WeightsError(_TORCH)
        if (module, name) not in _HARMLESS:
            asked = truncate(f"{module}.{name}")
            raise pickle.UnpicklingError(f"it asks for {asked}, which a file of weights has no use for")
        return _HARMLESS[module, name]

    def load_setitem(self) -> None:
        _refuse_keys(self.stack[-2:-1])
        _READ[pickle.SETITEM[0]](self)

    def load_setitems(self) -> None:
        _refuse_keys(self.stack[::2])  # since the mark
        _READ[pickle.SETITEMS[0]](self)

    def load_dict(self) -> None:
        _refuse_keys(self.stack[::2])
        _READ[pickle.DICT[0]](self)

    def no_use_for(self) -> None:
        raise pickle.UnpicklingError("it has sets or writable bytes, which a file of weights has no use for")

    # Sets hash what is in them; room is made for as many bytes as the file says that there are.
    dispatch: ClassVar[dict[int, Any]] = {
        **_READ,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        **dict.fromkeys((pickle.ADDITEMS[0], pickle.FROZENSET[0], pickle.BYTEARRAY8[0]), no_use_for),
    }


_BOOKKEEPING = "StructuredToParameterName@@"  # paddle.save's
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save's, before it wrote zip files


def _read_pickle(path: Path) -> Arrays:
    try:
        with path.open("rb") as file:
            content = _StateUnpickler(file).load()
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror})") from None
    except Exception as error:  # a broken pickle can raise anything
        raise WeightsError(f"{path}: is not a Paddle state dict ({_because(error)})") from None
    if isinstance(content, int) and content == _TORCH_MAGIC:
        raise WeightsError(f"{path}: {_TORCH}")
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds {type(content).__name__}, not a state dict")
    arrays: Arrays = {}
    for name, value in content.items():
        array = value[1] if isinstance(value, tuple) and len(value) == 2 else value  # a pickled Tensor: name, data
        if isinstance(name, str) and name != _BOOKKEEPING:
            try:
                found = array.array() if isinstance(array, _Array) else None
            except ValueError:
                raise WeightsError(f"{path}: {name} hasn't as many numbers as its shape") from None
            arrays[name] = None if found is None else _float32(found)
    return arrays

"""The CPU wheel made to trace and compile programs as Paddle's GPU wheel does. Nothing is executed.

Written for Paddle 3.3.1. The Python code of both wheels is the same. What differs while a program is built: mixed
precision is refused on a CPU, and operators are refused whose dtype has no kernel in the wheel.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.base import core

# The functions that refuse an operator whose dtype has no kernel in this wheel, and their first 16 bytes. They are
# called while a program is built. In the namespace paddle::dialect: CheckDataType, CheckValueDataType and
# CheckDataTypeOrValue.
_DTYPE_CHECKS = {
    "_ZN6paddle7dialect13CheckDataTypeERKN3phi8DataTypeERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEESC_": (
        "554889e5415741564989fe4155415453"
    ),
    "_ZN6paddle7dialect18CheckValueDataTypeERKN3pir5ValueERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEESC_": (
        "554889e541574989ff415641554989f5"
    ),
    "_ZN6paddle7dialect20CheckDataTypeOrValueERKN3phi8DataTypeERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
    "RKN3pir5ValueESC_SC_": "8b074989d14c89c285c075144889ce4c",
}
_RETURN = b"\xc3"  # the instruction `ret`
_READ_WRITE_EXECUTE, _READ_EXECUTE = 7, 5  # mprotect(2)


@contextmanager
def gpu_wheel() -> Iterator[None]:
    """Build programs as on an NVIDIA GPU of compute capability 9.0 within the context.

    Raises RuntimeError, before anything is changed, if this isn't the wheel that the changes were written for.
    """
    auto_cast = sys.modules["paddle.amp.auto_cast"]  # the package has a function of the same name
    grad_scaler = sys.modules["paddle.amp.grad_scaler"]
    with ExitStack() as stack:
        stack.enter_context(_no_dtype_checks())
        for module in (auto_cast, grad_scaler):
            stack.enter_context(patch.object(module, "_dygraph_tracer", _gpu_tracer))
        for name in ("_is_gpu_float16_supported", "_is_gpu_bfloat16_supported"):
            stack.enter_context(patch.object(auto_cast, name, lambda: True))
        stack.enter_context(patch.object(nn.Layer, "_transform", _transform))
        stack.enter_context(patch.object(core, "op_supported_infos", _op_supported_infos))
        yield


_op_supported_infos_in_paddle = cache(core.op_supported_infos)


def _op_supported_infos(place: str, dtype: Any) -> tuple[set[str], ...]:
    """Return the names of all operators, and of those with and without a kernel, as new sets.

    Paddle asks six times per program, and searches all kernels each time: a tenth of the time to compile.
    """
    return tuple(set(names) for names in _op_supported_infos_in_paddle(place, dtype))


class _GpuTracer:
    """Paddle's tracer, except that it says that it runs on a GPU."""

    class _expected_place:
        @staticmethod
        def is_gpu_place() -> bool:
            return True

        @staticmethod
        def is_xpu_place() -> bool:
            return False

        @staticmethod
        def is_custom_place() -> bool:
            return False

    def __init__(self, tracer: Any) -> None:
        object.__setattr__(self, "_tracer", tracer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tracer, name, value)


def _gpu_tracer() -> _GpuTracer | None:
    tracer = paddle.base.framework._dygraph_tracer()
    return None if tracer is None else _GpuTracer(tracer)


_transform_in_paddle = nn.Layer._transform


def _transform(self: nn.Layer, tensor: Any, device: Any, dtype: Any, blocking: bool) -> Any:
    """Convert a parameter. One of another pipeline stage has no values, and crashes in the CPU wheel's cast."""
    if tensor._is_initialized():
        return _transform_in_paddle(self, tensor, device, dtype, blocking)
    converted = dist.shard_tensor(paddle.zeros(tensor.shape, dtype), tensor.process_mesh, tensor.placements)
    tensor.value().get_tensor()._share_data_nocheck_with(converted.value().get_tensor())
    return tensor


@contextmanager
def _no_dtype_checks() -> Iterator[None]:
    """Make the functions of _DTYPE_CHECKS return at once within the context, in this process's memory only."""
    addresses = _dtype_check_addresses()
    for address in addresses:
        _write_code(address, _RETURN)
    try:
        yield
    finally:
        for address, first_bytes in addresses.items():
            _write_code(address, first_bytes[: len(_RETURN)])


def _dtype_check_addresses() -> dict[int, bytes]:
    """Return the first bytes of each function by its address. Raises RuntimeError for another wheel."""
    library = ctypes.CDLL(paddle.base.libpaddle.__file__)  # loaded already: the same copy
    addresses = {}
    for symbol, expected in _DTYPE_CHECKS.items():
        function = getattr(library, symbol, None)
        address = None if function is None else ctypes.cast(function, ctypes.c_void_p).value
        if address is None:
            raise RuntimeError(f"Paddle {paddle.__version__} exports no {symbol}: compile GPU programs with 3.3.1's")
        first_bytes = ctypes.string_at(address, len(expected) // 2)
        if first_bytes.hex() != expected:
            raise RuntimeError(
                f"Paddle {paddle.__version__}: {symbol} starts with {first_bytes.hex()}, not {expected} as in 3.3.1's "
                "CPU wheel for x86-64; read its code before changing it"
            )
        addresses[address] = first_bytes
    return addresses


def _write_code(address: int, code: bytes) -> None:
    page = address & ~(mmap.PAGESIZE - 1)
    num_bytes = address + len(code) - page
    _protect(page, num_bytes, _READ_WRITE_EXECUTE)
    ctypes.memmove(address, code, len(code))
    _protect(page, num_bytes, _READ_EXECUTE)


def _protect(page: int, num_bytes: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(num_bytes), protection):
        raise OSError(ctypes.get_errno(), "mprotect of Paddle's code failed")

"""Memory that kernels use while they run, kept from one to the next."""

from __future__ import annotations

import ctypes
from typing import Any

_ALIGNMENT = 64
_buffers: list[Any] = []


def scratch_memory(*num_bytes: int) -> list[int]:
    """Return the addresses of memory of these sizes, for the kernel that runs; kernels run one at a time."""
    aligned = [size + -size % _ALIGNMENT for size in num_bytes]
    total = sum(aligned) + _ALIGNMENT
    if not _buffers or len(_buffers[0]) < total:
        _buffers[:] = [ctypes.create_string_buffer(total)]
    address = ctypes.addressof(_buffers[0])
    address += -address % _ALIGNMENT
    return [address + sum(aligned[:index]) for index in range(len(aligned))]

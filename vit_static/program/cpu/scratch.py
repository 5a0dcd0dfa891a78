"""Memory that kernels use while they run, kept from one to the next, and the number of threads that share it."""

from __future__ import annotations

import ctypes
import os
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


def num_threads() -> int:
    """Return the number of OpenMP threads, as common/startup.py or the user has set it."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # the other numbers are of nested regions
    return int(first) if first.strip().isdecimal() else 1

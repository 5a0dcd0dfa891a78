"""The time limit of gloo's operations, 30 s, which neither Paddle nor an environment variable lets one change.

Each group has a `gloo::Context` with the limit as a field, and that refers to a `gloo::transport::Context` with a copy.
No binding leads to them, so they are searched for in this process's memory, by the layout that both have in Paddle
3.3.1 on x86-64. A field is written only if everything around it is as it must be; where nothing fits, gloo's limit
stays, and ranks wait only 30 s for a late one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import numpy as np

_DEFAULT_MS = 30_000
_DEFAULT = struct.pack("<q", _DEFAULT_MS)
_CHUNK = 1 << 20  # bytes read at a time

# Offsets in bytes. Both classes begin with the virtual table, then `rank` and `size`, two int32.
_RANK_AND_SIZE = 8
_TRANSPORT = 40  # in gloo::Context: pointer to its gloo::transport::Context
_CONTEXT_TIMEOUT, _TRANSPORT_TIMEOUT = 64, 80  # int64, in milliseconds


def set_gloo_timeouts(seconds: float) -> int:
    """Set the time limit of every gloo group of this process that has gloo's default.

    Returns the number of `gloo::Context` objects that were found, one or more per group; 0 with an unknown layout, or
    where a process may not write to its memory through /proc.
    """
    value, found = struct.pack("<q", int(1000 * seconds)), 0
    try:
        # Through this file, an address that isn't mapped is an error and not the end of the process.
        with open("/proc/self/mem", "r+b", buffering=0) as file:  # noqa: PTH123 - a Path would add nothing
            memory = file.fileno()
            for address in list(_addresses_of_default(memory)):
                transport = _transport_of(memory, address - _CONTEXT_TIMEOUT)
                if transport is not None:
                    os.pwrite(memory, value, address)
                    os.pwrite(memory, value, transport + _TRANSPORT_TIMEOUT)
                    found += 1
    except OSError:
        pass
    return found


def _addresses_of_default(memory: int) -> Iterator[int]:
    """Yield where this process's heap holds the default limit, as an int64."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123 - a Path would add nothing
        heaps = [line.split()[0].split("-") for line in maps if line.rstrip().endswith("[heap]")]
    chunk = memoryview(bytearray(_CHUNK))
    for first, last in heaps:
        for start in range(int(first, 16), int(last, 16), _CHUNK):
            num_bytes = os.preadv(memory, [chunk], start)
            aligned = np.frombuffer(chunk[: num_bytes // 8 * 8], np.int64)
            yield from (start + 8 * int(index) for index in np.flatnonzero(aligned == _DEFAULT_MS))


def _transport_of(memory: int, context: int) -> int | None:
    """Return the address of the transport's context, or None if `context` isn't a `gloo::Context`."""
    try:
        rank_and_size = os.pread(memory, 8, context + _RANK_AND_SIZE)
        (transport,) = struct.unpack("<q", os.pread(memory, 8, context + _TRANSPORT))
        rank, size = struct.unpack("<ii", rank_and_size)
        fits = (
            0 <= rank < size
            and os.pread(memory, 8, transport + _RANK_AND_SIZE) == rank_and_size
            and os.pread(memory, 8, transport + _TRANSPORT_TIMEOUT) == _DEFAULT
        )
    except (OSError, OverflowError, ValueError, struct.error):
        return None
    return transport if fits else None

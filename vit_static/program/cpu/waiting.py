"""How the threads of OpenMP wait for each other: spinning while the cores are free, sleeping while they are shared.

After a kernel, its threads spin for 200 ms by default, which saves waking them up for the next one. If another program
needs the core of one of them, the others spin until it runs again: several such waits per step take most of the time.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SPINNING_MS, _SLEEPING_MS = 200, 0  # KMP_BLOCKTIME; 200 is its default
_INTERVAL_S = 1.0
_SHARED, _FREE = 0.1, 0.03  # share of the time that a thread waits for a core
_SETTINGS = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY", "GOMP_SPINCOUNT")


class ThreadWaiting:
    """Adapts how the OpenMP threads that the calling thread starts wait to how busy the cores are.

    Always the same thread calls it. It does nothing if the user has set OpenMP's own variables, or where the kernel
    doesn't tell how long a thread has waited for a core (Linux: /proc/PID/task/TID/schedstat).
    """

    def __init__(
        self,
        set_block_time: Callable[[int], Any] | None = None,
        seconds_waited: Callable[[], float | None] | None = None,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`set_block_time` takes milliseconds, `seconds_waited` returns those that the thread has waited for a core."""
        self.is_sleeping = False
        self._clock, self._seconds_waited = clock, seconds_waited or _seconds_waited
        self._set_block_time = set_block_time or _kmp_set_blocktime()
        self._is_active = self._set_block_time is not None and not any(environ.get(name) for name in _SETTINGS)
        self._last_time, self._last_waited = clock(), self._seconds_waited()

    def update(self) -> None:
        """Look once per second how long the thread has waited for a core, and let its threads wait accordingly."""
        now = self._clock()
        if not self._is_active or now - self._last_time < _INTERVAL_S:
            return
        waited, before = self._seconds_waited(), self._last_waited
        share = 0.0 if waited is None or before is None else (waited - before) / (now - self._last_time)
        self._last_time, self._last_waited = now, waited
        should_sleep = share > (_FREE if self.is_sleeping else _SHARED)
        if should_sleep != self.is_sleeping and self._set_block_time is not None:
            self._set_block_time(_SLEEPING_MS if should_sleep else _SPINNING_MS)
            self.is_sleeping = should_sleep


def _seconds_waited() -> float | None:
    """Return how long the calling thread has been ready to run without getting a core; None if that is unknown."""
    try:
        fields = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
        return int(fields[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


def _kmp_set_blocktime() -> Callable[[int], Any] | None:
    """Return the function of the OpenMP library in Paddle's wheel; None in a wheel with another one."""
    import paddle

    path = Path(paddle.__file__).parent / "libs" / "libiomp5.so"
    if not path.is_file():
        return None
    function = getattr(ctypes.CDLL(str(path)), "kmp_set_blocktime", None)
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_int], None
    return function

"""The protocol of candidate processes: each gets ready, then works as long as each line of its input asks for.

The peers' scripts run in an environment of their own, so this imports nothing but the standard library.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(work: Callable[[], int], **ready_info: Any) -> None:
    """Follow the protocol until standard input ends; every reply is a line of JSON on standard output.

    The first reply says that the process is ready, and contains `ready_info`. Each input line is a number of seconds:
    `work` is called repeatedly for at least as long (at least once), and returns the number of images it processed. The
    reply has the total number of images, the seconds taken, and the seconds of each call. The last reply has the peak
    memory of the process.
    """
    _reply(ready=True, **ready_info)
    for line in sys.stdin:
        min_seconds, num_images, started = float(line), 0, time.perf_counter()
        elapsed, call_seconds = 0.0, []
        while elapsed < min_seconds or num_images == 0:
            num_images += work()
            before, elapsed = elapsed, time.perf_counter() - started
            call_seconds.append(round(elapsed - before, 6))
        _reply(num_images=num_images, seconds=elapsed, call_seconds=call_seconds)
    _reply(peak_bytes=peak_bytes())


def calls_per_second(work: Callable[[], object], seconds: float = 1.0) -> float:
    """Measure how often `work` can be called per second, for about `seconds`, after one call as warm-up."""
    work()
    started, num_calls = time.perf_counter(), 0
    while num_calls == 0 or time.perf_counter() - started < seconds:
        work()
        num_calls += 1
    return num_calls / (time.perf_counter() - started)


def peak_bytes() -> int:
    """Return the peak resident memory of this process.

    `getrusage` doesn't measure it: its value starts at the peak of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _reply(**values: Any) -> None:
    print(json.dumps(values), flush=True)

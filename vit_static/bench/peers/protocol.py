"""How a contender takes its turns: a process that gets ready, and then works for as long as each line tells it to.

For peers' scripts, which run in an environment of their own: this imports nothing but Python's own library.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(work: Callable[[], int], **known: Any) -> None:
    """Says that it is ready, with what is `known`; for each line of standard input, a number of seconds, repeats
    `work`, which returns the number of images that it has done, for at least as long, and says how it went and how long
    each call took. At the end of the input, says the most memory that the process has had."""
    _say(ready=True, **known)
    for line in sys.stdin:
        enough, num_images, started = float(line), 0, time.perf_counter()
        elapsed, calls = 0.0, []
        while elapsed < enough or num_images == 0:
            num_images += work()
            before, elapsed = elapsed, time.perf_counter() - started
            calls.append(round(elapsed - before, 6))
        _say(num_images=num_images, seconds=elapsed, calls=calls)
    _say(peak_bytes=peak_bytes())


def peak_bytes() -> int:
    """The most memory that this process has had. Not getrusage's: that begins with what the starting process had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)

"""What must stand in the environment before Paddle is imported: threads, the CPU's instructions, silence."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path


def prepare(verbose: bool = False, environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets variables that the user hasn't set; imports Paddle; keeps its start-up lines quiet unless `verbose`.

    - OMP_NUM_THREADS: Paddle's own default is one thread. All cores, shared by the processes of this machine.
    - MKL_DEBUG_CPU_TYPE: the MKLML in Paddle's wheel looks at the CPU's maker and leaves an AMD's AVX2 unused; told
      the type (5 is AVX2), its matrix products are about three times as quick.
    - FLAGS_enable_pir_in_executor_trace_run: one operator after another, each on all threads; without it the
      executor runs several at once, whose threads get into each other's way. (On cards it changes nothing: the
      operators are queued.)
    """
    num_threads = environ.get("OMP_NUM_THREADS") or str(_cores_a_process(environ))
    environ.setdefault("FLAGS_enable_pir_in_executor_trace_run", "1")
    if _amd_with_avx2():
        environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    if not verbose:
        environ.setdefault("GLOG_minloglevel", "2")
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        _silence_libraries()
    # Paddle warns of more than one thread when it is imported, though the threads start, and read this, later.
    environ["OMP_NUM_THREADS"] = "1"
    import paddle  # noqa: F401

    environ["OMP_NUM_THREADS"] = num_threads


def _cores_a_process(environ: MutableMapping[str, str]) -> int:
    num_local = int(environ.get("PADDLE_LOCAL_SIZE", "1"))
    return max(len(os.sched_getaffinity(0)) // num_local, 1)


def _silence_libraries() -> None:
    """Python keeps standard output; what C++ libraries print there (oneDNN's checks in Paddle, say) goes nowhere.

    Errors, which they write to standard error, stay.
    """
    sys.stdout.flush()
    ours = os.dup(1)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device, not a path
        os.dup2(nowhere.fileno(), 1)
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, buffering=1)


def _amd_with_avx2(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    return "AuthenticAMD" in text and " avx2" in text

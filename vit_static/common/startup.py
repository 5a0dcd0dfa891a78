"""What must stand in the environment before Paddle is imported: threads, the CPU's instructions, silence."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress

from vit_static.common.cpu import is_amd_with_avx2, max_cpu_isa, onednn_max_cpu_isa
from vit_static.common.library_output import _capture_library_output

_M_ARENA_MAX = -8  # malloc.h
_given: dict[str, str] | None = None  # the environment before `prepare`


def prepare_process(verbose: bool = False, environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets variables that the user hasn't set; imports Paddle; keeps its start-up lines quiet unless `verbose`.

    - OMP_NUM_THREADS: Paddle's own default is one thread. All cores, shared by the processes of this machine.
    - MKL_DEBUG_CPU_TYPE: the MKLML in Paddle's wheel looks at the CPU's maker and leaves an AMD's AVX2 unused; told
      the type (5 is AVX2), its matrix products are about three times as quick.
    - FLAGS_use_legacy_linear: without it a CUDA build's linear layer is one operator, for whose gradient the
      auto-parallel engine has no rule: it would gather activations in the backward of every mesh.
    - FLAGS_enable_pir_in_executor_trace_run: one operator after another, each on all threads; without it the
      executor runs several at once, whose threads get into each other's way. (On cards it changes nothing: the
      operators are queued.)
    - ONEDNN_MAX_CPU_ISA: AVX2 with VIT_STATIC_MAX_CPU_ISA=avx2, unless the user's own limit is lower.

    And glibc is told to keep no more heaps than there are cores (mallopt(3), M_ARENA_MAX): it would keep eight times as
    many, each with what the threads of some evaluation have left there.
    """
    global _given
    _given = dict(environ)
    if max_cpu_isa(environ) == "avx2" and onednn_max_cpu_isa(environ) not in ("sse41", "avx", "avx2"):
        environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, max(len(os.sched_getaffinity(0)), 2))
    num_threads = environ.get("OMP_NUM_THREADS") or str(_cores_a_process(environ))
    environ.setdefault("FLAGS_use_legacy_linear", "1")
    environ.setdefault("FLAGS_enable_pir_in_executor_trace_run", "1")
    if is_amd_with_avx2():
        environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    if not verbose:
        _capture_library_output()
    # Paddle warns of more than one thread when it is imported, though the threads start, and read this, later.
    environ["OMP_NUM_THREADS"] = "1"
    with _requests_held_back():
        import paddle  # noqa: F401

    environ["OMP_NUM_THREADS"] = num_threads
    if not verbose:
        faulthandler.enable(sys.stderr)  # after Paddle, whose own handler writes where it is put aside


def user_environ() -> dict[str, str]:
    """The environment that the user gave, without what `prepare` has set: for programs that aren't ours."""
    return dict(os.environ if _given is None else _given)


@contextmanager
def _requests_held_back() -> Iterator[None]:
    """SIGTERM and SIGINT inside come after it: half-way an import fails with another error, and Paddle's library puts
    its own handler of SIGTERM in the place of ours."""
    requests = {signal.SIGTERM, signal.SIGINT}
    handlers = {number: signal.getsignal(number) for number in requests}
    signal.pthread_sigmask(signal.SIG_BLOCK, requests)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # one that isn't Python's
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, requests)


def _cores_a_process(environ: MutableMapping[str, str]) -> int:
    num_local = int(environ.get("PADDLE_LOCAL_SIZE", "1"))
    return max(len(os.sched_getaffinity(0)) // num_local, 1)

"""Process set-up before Paddle is imported: file names, environment variables, memory allocator, quiet start."""

from __future__ import annotations

import ctypes
import faulthandler
import io
import locale
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from vit_static.common.cpu import is_amd_with_avx2, max_cpu_isa, onednn_max_cpu_isa
from vit_static.common.errors import UserError
from vit_static.common.installation import describe_missing
from vit_static.common.library_output import capture_library_output

# The variable by which the launcher passes a folder, in which a worker that begins to train creates a file RANK.
STARTED_FOLDER = "VIT_STATIC_STARTED_FOLDER"
_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1  # malloc.h
_MAX_KEPT_BLOCK = 2**30  # bytes
_RESEND_S = 0.05
_environ_before: dict[str, str] | None = None  # the environment before `prepare_process`
_stop_signal: int | None = None  # received while `handle_stop_signals` is in effect


def use_utf8() -> None:
    """Make names of files UTF-8 whatever the locale is, for the entry points: restart Python in its UTF-8 mode.

    In a locale such as zh_CN.GBK or C, Python would decode the same bytes differently from those in list files, which
    are UTF-8. Bytes that aren't UTF-8 become surrogate escapes (PEP 383), which every file written keeps. Terminals get
    text in the encoding of the locale, files and pipes get UTF-8; what can't be encoded is shown as escapes.
    """
    _open_missing_streams()
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")[1:-1]
        os.execv(sys.executable, [os.fsencode(sys.executable), b"-X", b"utf8", *arguments])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = locale.nl_langinfo(locale.CODESET) if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def _open_missing_streams() -> None:
    """Open the null device as standard input, output and error that the caller has closed (`>&-`), as for daemons.

    Otherwise the next file that is opened would get such a descriptor, and what is printed would end up in it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
            os.set_inheritable(descriptor, True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - live as long as the process
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def ignored_or(handler: Any, number: signal.Signals) -> Any:
    """Return the handler for a signal, or SIG_IGN where it was ignored at the start, as nohup ignores SIGHUP."""
    return signal.SIG_IGN if signal.getsignal(number) is signal.SIG_IGN else handler


def handle_stop_signals() -> None:
    """Let SIGTERM, SIGINT and SIGHUP raise KeyboardInterrupt, and remember the signal for `take_stop_signal`.

    The exception alone isn't reliable: raised in a function that a library's C++ calls, it may become another error, or
    be dropped. Where Python itself can't raise it, as in a weak reference's callback or `__del__`, the signal is sent
    again a moment later, and Python's report of it isn't printed.
    """
    global _stop_signal
    _stop_signal = None
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    signal.signal(signal.SIGHUP, ignored_or(_interrupt, signal.SIGHUP))


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _stop_signal
    _stop_signal = signum
    raise KeyboardInterrupt


class _UnraisableHook:
    """Sends a stop signal again if its KeyboardInterrupt could not be raised; leaves the rest to the hook before it."""

    def __init__(self, previous: Callable[[sys.UnraisableHookArgs], object]) -> None:
        self._previous = previous

    def __call__(self, unraisable: sys.UnraisableHookArgs) -> None:
        if _stop_signal is None or not isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._previous(unraisable)
            return
        timer = threading.Timer(_RESEND_S, _send_pending_stop_signal)
        timer.daemon = True  # it must not delay the end of the process
        timer.start()


def _send_pending_stop_signal() -> None:
    if _stop_signal is not None:  # nothing has answered it in the meantime
        os.kill(os.getpid(), _stop_signal)


def take_stop_signal() -> int | None:
    """Return the signal that has asked for an end, for the caller to answer; None if there was none."""
    global _stop_signal
    taken, _stop_signal = _stop_signal, None
    return taken


def prepare_process(verbose: bool = False, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set variables that the user hasn't set, then import Paddle; hide what libraries print unless `verbose`.

    - OMP_NUM_THREADS: the cores of this machine, divided among its processes. Paddle's default is one thread.
    - MKL_DEBUG_CPU_TYPE: MKLML in Paddle's wheel doesn't use AVX2 on AMD CPUs unless this is 5. With it, matrix
      products are about three times as fast.
    - FLAGS_use_legacy_linear: otherwise the linear layer of a CUDA build is one operator whose gradient has no rule in
      the auto-parallel engine, which would then gather activations in the backward pass on every mesh.
    - FLAGS_enable_pir_in_executor_trace_run: run operators one after another, each on all threads. Otherwise the
      executor runs several at once, and their threads compete. On GPUs this makes no difference.
    - ONEDNN_MAX_CPU_ISA: AVX2 with VIT_STATIC_MAX_CPU_ISA=avx2, unless the user's own limit is lower.

    Also limit glibc to one heap per core (mallopt(3), M_ARENA_MAX). Its default is eight per core, and each heap keeps
    memory that threads have freed.
    """
    global _environ_before
    _environ_before = dict(environ)
    if max_cpu_isa(environ) == "avx2" and onednn_max_cpu_isa(environ) not in ("sse41", "avx", "avx2"):
        environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, max(len(os.sched_getaffinity(0)), 2))
    num_threads = environ.get("OMP_NUM_THREADS") or str(_cores_per_process(environ))
    environ.setdefault("FLAGS_use_legacy_linear", "1")
    environ.setdefault("FLAGS_enable_pir_in_executor_trace_run", "1")
    if is_amd_with_avx2():
        environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    if not verbose:
        capture_library_output()
    # Paddle warns on import if this is above 1. Its threads start later, and read the value set below.
    environ["OMP_NUM_THREADS"] = "1"
    with _stop_signals_deferred():
        import paddle  # noqa: F401

    environ["OMP_NUM_THREADS"] = num_threads
    if not verbose:
        faulthandler.enable(sys.stderr)  # after the import, which sets a handler that writes to the log


def keep_freed_memory() -> None:
    """Let the process keep memory that it frees, for the next step of a program on a CPU.

    By default glibc returns a freed activation to the kernel and asks for it again in the next step, and the kernel
    fills each page with zeros, one page fault at a time: 7,500 in a step of the quickstart. Blocks of more than 1 GiB
    are returned as before.
    """
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _MAX_KEPT_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def import_paddle_quietly() -> None:
    """Import Paddle in a caller's process, as `prepare_process` does, without its messages.

    Nothing that the caller prints is redirected. If Paddle has been imported, nothing happens. Raise UserError if it
    isn't installed.
    """
    if "paddle" in sys.modules:
        return
    os.environ.setdefault("GLOG_minloglevel", "2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            prepare_process(verbose=True)
        except ModuleNotFoundError as error:
            raise UserError(describe_missing(error) or str(error)) from error


def user_environ() -> dict[str, str]:
    """Return the environment without the changes of `prepare_process`, for starting other programs."""
    return dict(os.environ if _environ_before is None else _environ_before)


@contextmanager
def _stop_signals_deferred() -> Iterator[None]:
    """Deliver the signals that ask for an end only after the block, to the handlers that were set before it.

    A signal in the middle of an import would surface as another error, and Paddle replaces the handler of SIGTERM.
    """
    stop_signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    is_main = threading.current_thread() is threading.main_thread()  # another thread can't set handlers
    handlers = {number: signal.getsignal(number) for number in stop_signals if is_main}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: a handler that wasn't set from Python
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals)


def _cores_per_process(environ: MutableMapping[str, str]) -> int:
    num_local = int(environ.get("PADDLE_LOCAL_SIZE", "1"))
    return max(len(os.sched_getaffinity(0)) // num_local, 1)

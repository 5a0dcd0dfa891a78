"""What must stand in the environment before Paddle is imported: threads, the CPU's instructions, silence."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from vit_static.config import UserError

MAX_CPU_ISA = "VIT_STATIC_MAX_CPU_ISA"  # avx2, or unset
_CPUINFO = Path("/proc/cpuinfo")
# The same limit for oneDNN, in the order in which version 3.6, Paddle's, reads them; an empty one counts as unset.
_ONEDNN_MAX_CPU_ISA = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
# The flags of the two lines above that each of oneDNN's limits leaves. Every other value, AMX's among them, leaves all
# of them; oneDNN too ignores a value that it doesn't know.
_FLAGS_WITHIN: dict[str, frozenset[str]] = {
    **dict.fromkeys(("sse41", "avx", "avx2", "avx512_core"), frozenset()),
    **dict.fromkeys(("avx2_vnni", "avx2_vnni_2"), frozenset({"avx_vnni"})),
    "avx512_core_vnni": frozenset({"avx512_vnni"}),
    "avx512_core_bf16": frozenset({"avx512_vnni", "avx512_bf16"}),
    **dict.fromkeys(("avx512_core_fp16", "avx10_1_512"), frozenset({"avx_vnni", "avx512_vnni", "avx512_bf16"})),
}
_M_ARENA_MAX = -8  # malloc.h
_aside: Aside | None = None
_given: dict[str, str] | None = None  # the environment before `prepare`


def prepare(verbose: bool = False, environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets variables that the user hasn't set; imports Paddle; keeps its start-up lines quiet unless `verbose`.

    - OMP_NUM_THREADS: Paddle's own default is one thread. All cores, shared by the processes of this machine.
    - MKL_DEBUG_CPU_TYPE: the MKLML in Paddle's wheel looks at the CPU's maker and leaves an AMD's AVX2 unused; told
      the type (5 is AVX2), its matrix products are about three times as quick.
    - FLAGS_use_legacy_linear: without it a CUDA build's linear layer is one operator, for whose gradient the
      auto-parallel engine has no rule: it would gather activations in the backward of every mesh.
    - FLAGS_enable_pir_in_executor_trace_run: one operator after another, each on all threads; without it the
      executor runs several at once, whose threads get into each other's way. (On cards it changes nothing: the
      operators are queued.)
    - ONEDNN_MAX_CPU_ISA: AVX2 where VIT_STATIC_MAX_CPU_ISA=avx2 asks for it, unless the user's own limit is lower.

    And glibc is told to keep no more heaps than there are cores (mallopt(3), M_ARENA_MAX): it would keep eight times as
    many, each with what the threads of some evaluation have left there.

    Raises UserError for an unknown value of VIT_STATIC_MAX_CPU_ISA.
    """
    global _given
    _given = dict(environ)
    if _max_cpu_isa(environ) == "avx2" and _onednn_max_cpu_isa(environ) not in ("sse41", "avx", "avx2"):
        environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, max(len(os.sched_getaffinity(0)), 2))
    num_threads = environ.get("OMP_NUM_THREADS") or str(_cores_a_process(environ))
    environ.setdefault("FLAGS_use_legacy_linear", "1")
    environ.setdefault("FLAGS_enable_pir_in_executor_trace_run", "1")
    if _amd_with_avx2():
        environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    if not verbose:
        _put_libraries_aside()
    # Paddle warns of more than one thread when it is imported, though the threads start, and read this, later.
    environ["OMP_NUM_THREADS"] = "1"
    with _requests_held_back():
        import paddle  # noqa: F401

    environ["OMP_NUM_THREADS"] = num_threads
    if not verbose:
        faulthandler.enable(sys.stderr)  # after Paddle, whose own handler writes where it is put aside


def given_environ() -> dict[str, str]:
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


def _put_libraries_aside() -> None:
    """Python keeps the console; what libraries print there goes aside: C++'s on either stream, Python's warnings, and
    what is logged below an error.

    (oneDNN's checks in Paddle come on standard output, a decoder's complaints of a bad file on standard error.)
    """
    global _aside
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stdout, sys.stderr = (
        os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors=stream.errors, buffering=1)
        for stream in (sys.stdout, sys.stderr)
    )
    descriptor, name = tempfile.mkstemp(prefix="vit_static_", suffix=".log")
    Path(name).unlink()
    _send_aside(Aside(descriptor, None, 0))
    warnings.showwarning = lambda *said, **_: _say_aside(warnings.formatwarning(*said[:4]))
    shown = logging.StreamHandler.emit

    def emit(handler: logging.StreamHandler[Any], record: logging.LogRecord) -> None:
        to_console = handler.stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        if to_console and record.levelno < logging.ERROR:
            _say_aside(handler.format(record) + "\n")
        else:
            shown(handler, record)

    logging.StreamHandler.emit = emit  # type: ignore[method-assign, assignment]


@dataclass(frozen=True)
class Aside:
    """Where libraries' words go: a file, without a name until there is a place for it; this process's are from `start`
    on."""

    descriptor: int
    path: Path | None
    start: int


def _send_aside(aside: Aside) -> None:
    global _aside
    before, _aside = _aside, aside
    os.dup2(aside.descriptor, 1)
    os.dup2(aside.descriptor, 2)
    if before is not None:
        os.close(before.descriptor)


def _say_aside(text: str) -> None:
    if _aside is not None:
        with suppress(OSError):  # a full disk
            os.write(_aside.descriptor, text.encode(errors="replace"))


def keep_aside(path: Path) -> None:
    """What libraries have said so far, and will, goes to the end of this file; nothing where it is shown anyway."""
    if _aside is None or _aside.path == path:
        return
    said = said_aside()
    with suppress(OSError):  # then it stays where it is
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        start = os.lseek(descriptor, 0, os.SEEK_END)
        _send_aside(Aside(descriptor, path, start))
        _say_aside(f"-- {datetime.now().astimezone().isoformat(timespec='seconds')}, process {os.getpid()}\n{said}")


def said_aside(most_lines: int | None = None) -> str:
    """What libraries have printed so far, where `prepare` has put it aside: the last lines, and where the rest is."""
    if _aside is None:
        return ""
    size = os.lseek(_aside.descriptor, 0, os.SEEK_END) - _aside.start
    lines = os.pread(_aside.descriptor, size, _aside.start).decode(errors="replace").splitlines(keepends=True)
    if most_lines is None or len(lines) <= most_lines:
        return "".join(lines)
    where = "" if _aside.path is None else f" ({_aside.path} has all)"
    return f"... the last {most_lines} of {len(lines)} lines that libraries printed{where}:\n" + "".join(
        lines[-most_lines:]
    )


def cpu_has_bfloat16(cpuinfo: Path = _CPUINFO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the CPU multiplies bfloat16: AVX512-BF16 or AMX."""
    return bool(_BFLOAT16_FLAGS & cpu_flags(cpuinfo, environ))


def cpu_has_vnni(cpuinfo: Path = _CPUINFO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the CPU adds products of 8-bit numbers in 32 bits: VNNI or AMX.

    Without it ONNX Runtime adds each two products of unsigned activations and signed weights in 16 bits, where the sum
    of 8-bit ones saturates, and of 7-bit weights doesn't.
    """
    return bool(_VNNI_FLAGS & cpu_flags(cpuinfo, environ))


def cpu_flags(cpuinfo: Path = _CPUINFO, environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Return the CPU's flags in /proc/cpuinfo, without those for bfloat16 and 8-bit products that lie above
    VIT_STATIC_MAX_CPU_ISA or oneDNN's own limit. Raises UserError for an unknown value of the former.

    ONNX Runtime has no such limit (1.32: MLAS's platform.cpp reads CPUID alone), nor have Paddle's own kernels: both
    use all that the CPU has. An int8 export is therefore made so that its results don't depend on the CPU
    (onnx_files.quantise).
    """
    flags = frozenset(_cpu_description(cpuinfo).split())
    for isa in (_max_cpu_isa(environ), _onednn_max_cpu_isa(environ)):
        if isa in _FLAGS_WITHIN:
            flags -= (_BFLOAT16_FLAGS | _VNNI_FLAGS) - _FLAGS_WITHIN[isa]
    return flags


def _max_cpu_isa(environ: Mapping[str, str]) -> str:
    isa = environ.get(MAX_CPU_ISA, "")
    if isa not in ("", "avx2"):
        raise UserError(f"{MAX_CPU_ISA}={isa}: unknown instruction set; set avx2, or unset the variable")
    return isa


def _onednn_max_cpu_isa(environ: Mapping[str, str]) -> str:
    return next((environ[name] for name in _ONEDNN_MAX_CPU_ISA if environ.get(name)), "").lower()


def _amd_with_avx2(cpuinfo: Path = _CPUINFO) -> bool:
    words = _cpu_description(cpuinfo).split()
    return "AuthenticAMD" in words and "avx2" in words


def _cpu_description(cpuinfo: Path) -> str:
    try:
        return cpuinfo.read_text()
    except OSError:
        return ""

"""What is found of the machine, and set in the environment, before Paddle is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.small import ROOT

from vit_static.common import startup
from vit_static.common.cpu import cpu_has_bfloat16, cpu_has_vnni
from vit_static.common.errors import UserError

pytestmark = pytest.mark.cpu_isa
EPYC = "vendor_id : AuthenticAMD\nflags : fpu avx2 avx512f avx512_bf16 fsrm\n"
XEON = "vendor_id : GenuineIntel\nflags : fpu avx2 avx512f amx_bf16 amx_tile\n"
OLDER = "vendor_id : GenuineIntel\nflags : fpu avx2 avx512f avx512_vnni\n"
LARGE = "vendor_id : AuthenticAMD\nflags : fpu avx2 avx_vnni avx512f avx512_vnni avx512_bf16\n"


@pytest.mark.parametrize(("cpuinfo", "has"), [(EPYC, True), (XEON, True), (OLDER, False), (None, False)])
def test_bfloat16_is_found_in_the_cpus_flags(tmp_path: Path, cpuinfo: str | None, has: bool) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    assert cpu_has_bfloat16(path, {}) == has


@pytest.mark.parametrize(
    ("cpuinfo", "environ", "has_vnni", "has_bfloat16"),
    [
        (OLDER, {}, True, False),
        ("flags : avx2 avx_vnni", {}, True, False),
        ("flags : avx2 avx512f", {}, False, False),
        (LARGE, {"VIT_STATIC_MAX_CPU_ISA": ""}, True, True),
        (LARGE, {"VIT_STATIC_MAX_CPU_ISA": "avx2"}, False, False),
        (LARGE, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False, False),
        (LARGE, {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, False, False),
        (LARGE, {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, True, False),
        (LARGE, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, True, False),
        (LARGE, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True, True),
        (XEON, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, False, False),
        (XEON, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, False, True),
        (LARGE, {"ONEDNN_MAX_CPU_ISA": "DEFAULT", "DNNL_MAX_CPU_ISA": "AVX2"}, True, True),
        (LARGE, {"ONEDNN_MAX_CPU_ISA": "", "DNNL_MAX_CPU_ISA": "AVX2"}, False, False),
        (LARGE, {"VIT_STATIC_MAX_CPU_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, False, False),
    ],
)
def test_a_larger_cpu_is_limited_to_a_smaller_one(
    tmp_path: Path, cpuinfo: str, environ: dict[str, str], has_vnni: bool, has_bfloat16: bool
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert cpu_has_vnni(path, environ) == has_vnni
    assert cpu_has_bfloat16(path, environ) == has_bfloat16


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "AVX2"), ("AVX512_CORE", "AVX2"), ("DEFAULT", "AVX2"), ("SSE41", "SSE41")]
)
def test_the_limit_reaches_onednn_unless_the_users_is_lower(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.setattr(startup, "_environ_before", None)  # restored at the end
    environ = {"VIT_STATIC_MAX_CPU_ISA": "avx2"} | ({} if given is None else {"ONEDNN_MAX_CPU_ISA": given})
    startup.prepare_process(verbose=True, environ=environ)
    assert environ["ONEDNN_MAX_CPU_ISA"] == expected


EFFECTIVE_ISA = """
import ctypes
from pathlib import Path
from vit_static.common.startup import prepare_process
prepare_process(verbose=True)
import paddle
library = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libdnnl.so.3"))
print(library.dnnl_get_effective_cpu_isa())
"""


def test_onednn_obeys_the_limit() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_MAX_CPU_ISA")}
    environ |= {"VIT_STATIC_MAX_CPU_ISA": "avx2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EFFECTIVE_ISA]
    finished = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=True)
    assert int(finished.stdout.splitlines()[-1]) == 0x7  # dnnl_cpu_isa_avx2


def test_an_unknown_limit_is_refused_in_one_line() -> None:
    for function in (cpu_has_bfloat16, cpu_has_vnni):
        with pytest.raises(UserError, match=r"^VIT_STATIC_MAX_CPU_ISA=avx3: unknown instruction set; set avx2, or"):
            function(environ={"VIT_STATIC_MAX_CPU_ISA": "avx3"})
    environ = os.environ | {"VIT_STATIC_MAX_CPU_ISA": "avx3", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vit_static", "predict", "--model", "missing", "image.png"]
    finished = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.startswith("vit_static: VIT_STATIC_MAX_CPU_ISA=avx3: ") and finished.stderr.count("\n") == 1


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_environ_before", None)  # restored at the end
    environ = {"OMP_NUM_THREADS": "7", "FLAGS_use_legacy_linear": "0", "MKL_DEBUG_CPU_TYPE": "4"}
    given = dict(environ)
    startup.prepare_process(verbose=True, environ=environ)
    assert {name: environ[name] for name in given} == given
    assert environ["FLAGS_enable_pir_in_executor_trace_run"] == "1"
    assert startup.user_environ() == given


INTERRUPTED_WHERE_NOTHING_CAN_BE_RAISED = """
import signal, sys, time, weakref
from vit_static.common.startup import handle_stop_signals, take_stop_signal

class Something:
    pass

def raise_in_callback(_):
    raise OSError("another error")

def interrupt(_):
    signal.raise_signal(signal.SIGTERM)

handle_stop_signals()
for callback in (raise_in_callback, interrupt):
    something = Something()
    reference = weakref.ref(something, callback)
    del something
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted by", take_stop_signal())
"""


def test_a_signal_whose_exception_is_dropped_is_sent_again() -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERRUPTED_WHERE_NOTHING_CAN_BE_RAISED]
    finished = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=50, check=True)
    assert finished.stdout == "interrupted by 15\n"
    assert "another error" in finished.stderr and "KeyboardInterrupt" not in finished.stderr

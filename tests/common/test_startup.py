"""What is found of the machine, and set in the environment, before Paddle is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_static.common import startup
from vit_static.common.cpu import cpu_has_bfloat16

EPYC = "vendor_id : AuthenticAMD\nflags : fpu avx2 avx512f avx512_bf16 fsrm\n"
XEON = "vendor_id : GenuineIntel\nflags : fpu avx2 avx512f amx_bf16 amx_tile\n"
OLDER = "vendor_id : GenuineIntel\nflags : fpu avx2 avx512f avx512_vnni\n"


@pytest.mark.parametrize(("cpuinfo", "has"), [(EPYC, True), (XEON, True), (OLDER, False), (None, False)])
def test_bfloat16_is_found_in_the_cpus_flags(tmp_path: Path, cpuinfo: str | None, has: bool) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    assert cpu_has_bfloat16(path) == has


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_given", None)  # put back at the end
    environ = {"OMP_NUM_THREADS": "7", "FLAGS_use_legacy_linear": "0", "MKL_DEBUG_CPU_TYPE": "4"}
    given = dict(environ)
    startup.prepare_process(verbose=True, environ=environ)
    assert {name: environ[name] for name in given} == given
    assert environ["FLAGS_enable_pir_in_executor_trace_run"] == "1"
    assert startup.user_environ() == given

"""What this CPU is and which instruction sets it has."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name as its maker says it; elsewhere than on x86 the architecture's."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read(cpuinfo), re.MULTILINE)
    return found[1] if found else platform.machine()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


_CPUINFO = Path("/proc/cpuinfo")


def cpu_has_bfloat16(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether the CPU multiplies bfloat16: AVX512-BF16 or AMX."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpu_description(cpuinfo).split()))


def _amd_with_avx2(cpuinfo: Path = _CPUINFO) -> bool:
    words = _cpu_description(cpuinfo).split()
    return "AuthenticAMD" in words and "avx2" in words


def _cpu_description(cpuinfo: Path) -> str:
    try:
        return cpuinfo.read_text()
    except OSError:
        return ""

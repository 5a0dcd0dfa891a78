"""The CPU's name and instruction sets, and the limit that VIT_STATIC_MAX_CPU_ISA sets to them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from vit_static.common.errors import UserError

MAX_CPU_ISA = "VIT_STATIC_MAX_CPU_ISA"  # avx2, or unset
_CPUINFO = Path("/proc/cpuinfo")
# oneDNN's own limit, in the order in which version 3.6 (Paddle's) reads the names; an empty value counts as unset.
_ONEDNN_MAX_CPU_ISA = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
# The flags of the two lines above within each of oneDNN's limits. Every other value, AMX's among them, keeps
# all of them; oneDNN, too, ignores a value that it doesn't know.
_FLAGS_WITHIN: dict[str, frozenset[str]] = {
    **dict.fromkeys(("sse41", "avx", "avx2", "avx512_core"), frozenset()),
    **dict.fromkeys(("avx2_vnni", "avx2_vnni_2"), frozenset({"avx_vnni"})),
    "avx512_core_vnni": frozenset({"avx512_vnni"}),
    "avx512_core_bf16": frozenset({"avx512_vnni", "avx512_bf16"}),
    **dict.fromkeys(("avx512_core_fp16", "avx10_1_512"), frozenset({"avx_vnni", "avx512_vnni", "avx512_bf16"})),
}


def cpu_model(cpuinfo: Path = _CPUINFO) -> str:
    """Return the CPU's model name, or the architecture's where /proc/cpuinfo has none."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(cpuinfo), re.MULTILINE)
    return match[1] if match else platform.machine()


def cpu_has_bfloat16(cpuinfo: Path = _CPUINFO, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the CPU multiplies bfloat16: AVX512-BF16 or AMX."""
    return bool(_BFLOAT16_FLAGS & cpu_flags(cpuinfo, environ))


def cpu_has_vnni(cpuinfo: Path = _CPUINFO, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the CPU accumulates products of 8-bit numbers in 32 bits: VNNI or AMX.

    Without it ONNX Runtime adds pairs of products of unsigned activations and signed weights in 16 bits. There the sum
    saturates with 8-bit weights, and doesn't with 7-bit ones.
    """
    return bool(_VNNI_FLAGS & cpu_flags(cpuinfo, environ))


def cpu_flags(cpuinfo: Path = _CPUINFO, environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Return the flags in /proc/cpuinfo, without those for bfloat16 and 8-bit products above VIT_STATIC_MAX_CPU_ISA or
    oneDNN's own limit. Raise UserError for an unknown value of the former.

    ONNX Runtime has no such limit (1.32: MLAS's platform.cpp reads CPUID alone), nor have Paddle's own kernels: both
    use everything that the CPU has. int8 exports are therefore made so that their results don't depend on the CPU
    (export/onnx.py, quantize).
    """
    flags = frozenset(_read(cpuinfo).split())
    for isa in (max_cpu_isa(environ), onednn_max_cpu_isa(environ)):
        if isa in _FLAGS_WITHIN:
            flags -= (_BFLOAT16_FLAGS | _VNNI_FLAGS) - _FLAGS_WITHIN[isa]
    return flags


def max_cpu_isa(environ: Mapping[str, str]) -> str:
    """Return VIT_STATIC_MAX_CPU_ISA's value, empty where it is unset. Raise UserError for an unknown value."""
    isa = environ.get(MAX_CPU_ISA, "")
    if isa not in ("", "avx2"):
        raise UserError(f"{MAX_CPU_ISA}={isa}: unknown instruction set; set avx2, or unset the variable")
    return isa


def onednn_max_cpu_isa(environ: Mapping[str, str]) -> str:
    """Return the user's own limit for oneDNN in lower case, empty where it is unset."""
    return next((environ[name] for name in _ONEDNN_MAX_CPU_ISA if environ.get(name)), "").lower()


def is_amd_with_avx2(cpuinfo: Path = _CPUINFO) -> bool:
    """Return whether the CPU is made by AMD and has AVX2."""
    words = _read(cpuinfo).split()
    return "AuthenticAMD" in words and "avx2" in words


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

"""GPUs and networks: memory, bandwidths and peak rates from NVIDIA's data sheets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuSpec:
    """Data sheet of a GPU: bytes, bytes per second, and operations per second without sparsity, in decimal units."""

    driver_name: str  # the words of the driver's device name that identify the GPU
    memory: float
    memory_bandwidth: float
    link_bandwidth: float  # in one direction, to the other GPUs of its node: NVLink, or PCIe where it has none
    peak_flops: Mapping[str, float]  # by dtype; a dtype is missing where the GPU doesn't multiply it


def _peaks(half: float, float32: float) -> Mapping[str, float]:
    return {"bfloat16": half, "float16": half, "float32": float32}


# Of two GPUs whose driver names both occur in a device name, the more specific one comes first.
GPUS: dict[str, GpuSpec] = {
    "v100-32g": GpuSpec("V100", 32e9, 900e9, 150e9, {"float16": 125e12, "float32": 15.7e12}),
    "a100-40g": GpuSpec("A100", 40e9, 1555e9, 300e9, _peaks(312e12, 19.5e12)),
    "a100-80g": GpuSpec("A100", 80e9, 2039e9, 300e9, _peaks(312e12, 19.5e12)),
    "h100-nvl": GpuSpec("H100 NVL", 94e9, 3900e9, 300e9, _peaks(835e12, 60e12)),
    "h100-pcie": GpuSpec("H100 PCIe", 80e9, 2000e9, 64e9, _peaks(756e12, 51e12)),
    "h100": GpuSpec("H100", 80e9, 3350e9, 450e9, _peaks(989e12, 67e12)),
    "h200": GpuSpec("H200", 141e9, 4800e9, 450e9, _peaks(989e12, 67e12)),
    "a10": GpuSpec("A10", 24e9, 600e9, 32e9, _peaks(125e12, 31.2e12)),
    "l40s": GpuSpec("L40S", 48e9, 864e9, 32e9, _peaks(362e12, 91.6e12)),
    "l40": GpuSpec("L40", 48e9, 864e9, 32e9, _peaks(181e12, 90.5e12)),
    "l4": GpuSpec("L4", 24e9, 300e9, 32e9, _peaks(121e12, 30.3e12)),
}

# Between nodes, in bytes per second and GPU in one direction, with one network adapter per GPU.
INTERCONNECTS: dict[str, float] = {
    "ib-ndr": 50e9,  # 400 Gb/s
    "ib-hdr": 25e9,  # 200 Gb/s
    "100g": 12.5e9,
    "25g": 3.125e9,
}
GPUS_PER_NODE = 8

# Bytes of a GPU's memory that the driver's context, NCCL's buffers and library workspaces take: an order of magnitude.
RESERVED_BYTES = 2e9


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the peak rate of a GPU, in operations per second, by the name that its driver reports.

    None if the rate isn't known: for an unlisted GPU or any CPU, or if the GPU doesn't multiply this dtype.
    """
    for gpu in GPUS.values():
        if re.search(rf"\b{gpu.driver_name}\b", device_name):
            return gpu.peak_flops.get(dtype)
    return None

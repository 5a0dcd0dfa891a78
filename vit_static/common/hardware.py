"""Cards and networks that a plan can be made for: NVIDIA's data sheets, dense rates, decimal units."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceSpec:
    """A card. Bytes, bytes a second, operations a second; `link_bandwidth` in one direction, to the node's others."""

    card: str  # as its driver says it (flops.peak_flops)
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


DEVICES: dict[str, DeviceSpec] = {
    "v100-32g": DeviceSpec("V100", 32e9, 900e9, 150e9),
    "a100-40g": DeviceSpec("A100", 40e9, 1555e9, 300e9),
    "a100-80g": DeviceSpec("A100", 80e9, 2039e9, 300e9),
    "h100": DeviceSpec("H100", 80e9, 3350e9, 450e9),
    "h200": DeviceSpec("H200", 141e9, 4800e9, 450e9),
    "l40s": DeviceSpec("L40S", 48e9, 864e9, 32e9),
    "l4": DeviceSpec("L4", 24e9, 300e9, 32e9),
}

# Between nodes: bytes a second and card in one direction, a network adapter for each card.
INTERCONNECTS: dict[str, float] = {
    "ib-ndr": 50e9,  # 400 Gb/s
    "ib-hdr": 25e9,  # 200 Gb/s
    "100g": 12.5e9,
    "25g": 3.125e9,
}
GPUS_PER_NODE = 8

# What the driver's context, NCCL's buffers and the libraries' workspaces take of a card; of the order of what is seen.
RESERVED_BYTES = 2e9


# Dense peak in operations a second by a part of the card's name and by precision: NVIDIA's data sheets.
_PEAK_FLOPS: dict[str, dict[str, float]] = {
    "H200": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    "H100 NVL": {"bfloat16": 835e12, "float16": 835e12, "float32": 60e12},
    "H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "float32": 51e12},
    "H100": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
    "V100": {"float16": 125e12, "float32": 15.7e12},
    "A10": {"bfloat16": 125e12, "float16": 125e12, "float32": 31.2e12},
    "L40S": {"bfloat16": 362e12, "float16": 362e12, "float32": 91.6e12},
    "L40": {"bfloat16": 181e12, "float16": 181e12, "float32": 90.5e12},
    "L4": {"bfloat16": 121e12, "float16": 121e12, "float32": 30.3e12},
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The card's dense peak for `dtype`, or None where it isn't known (every CPU, among others)."""
    for name, rates in _PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return rates.get(dtype)
    return None

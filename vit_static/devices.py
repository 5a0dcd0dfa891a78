"""Cards and networks that a plan can be made for: NVIDIA's data sheets, dense rates, decimal units."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A card. Bytes, bytes a second, operations a second; `link_bandwidth` in one direction, to the node's others."""

    card: str  # as its driver says it (flops.peak_flops)
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


DEVICES: dict[str, Device] = {
    "v100-32g": Device("V100", 32e9, 900e9, 150e9),
    "a100-40g": Device("A100", 40e9, 1555e9, 300e9),
    "a100-80g": Device("A100", 80e9, 2039e9, 300e9),
    "h100": Device("H100", 80e9, 3350e9, 450e9),
    "h200": Device("H200", 141e9, 4800e9, 450e9),
    "l40s": Device("L40S", 48e9, 864e9, 32e9),
    "l4": Device("L4", 24e9, 300e9, 32e9),
}

# Between nodes: bytes a second and card in one direction, a network adapter for each card.
INTERCONNECTS: dict[str, float] = {
    "ib-ndr": 50e9,  # 400 Gb/s
    "ib-hdr": 25e9,  # 200 Gb/s
    "100g": 12.5e9,
    "25g": 3.125e9,
}
CARDS_A_NODE = 8

# What the driver's context, NCCL's buffers and the libraries' workspaces take of a card; of the order of what is seen.
RESERVED_BYTES = 2e9

"""Gated MLPs in torch's files: the gate is a layer of its own, or one layer with the values."""

from __future__ import annotations

from vit_static.weights.state import State

# The gate comes first. `w12` stands for an `fc1` that holds both (`packed_by_name`), and is DINOv2's and EVA-02's name.
PACKED = {"blocks.{}.mlp.w12.": ("blocks.{}.mlp.gate", "blocks.{}.mlp.fc1")}


def packed_by_name(state: State) -> State:
    """Call the first layer of a gated MLP `w12` if it holds the gate too: it has twice the outputs."""
    arrays = dict(state)
    for name in state:
        if name.endswith(".mlp.fc1.weight"):
            prefix = name.removesuffix("fc1.weight")
            first, last = state[name], state.get(f"{prefix}fc2.weight")
            if last is not None and first.ndim == last.ndim == 2 and len(first) == 2 * last.shape[1]:
                for suffix in ("weight", "bias"):
                    if f"{prefix}fc1.{suffix}" in arrays:
                        arrays[f"{prefix}w12.{suffix}"] = arrays.pop(f"{prefix}fc1.{suffix}")
    return arrays


def name_packed(arrays: State, num_heads: int) -> State:
    """Give such a layer its name in timm; inverse of `packed_by_name`."""
    return {name.replace(".mlp.w12.", ".mlp.fc1."): array for name, array in arrays.items()}


def name_gated(arrays: State, num_heads: int) -> State:
    """Give the first layer of a gated MLP, beside a gate `fc1_g`, timm's name."""
    is_gated = any(".mlp.fc1_g." in name for name in arrays)
    return {name.replace(".mlp.fc1.", ".mlp.fc1_x.") if is_gated else name: array for name, array in arrays.items()}

"""Orders of a head's channels for rotary positions.

This program turns the pairs of channels i and i + d / 2 of each head, with the pairs of the row first, as DINOv3 does.
Other programs pair channels 2 i and 2 i + 1, or let the pairs of the column come first. Attention is the same if the
columns of the query and key projections, and the norms of queries and keys, are in the program's order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import numpy as np

from vit_static.weights.state import State

RopeOrder = Literal["halves", "interleaved", "interleaved_columns_first"]


def channel_order(order: RopeOrder, head_dim: int) -> np.ndarray:
    """Return which of our channels of a head each channel in an order is, [d]; `head_dim` is a multiple of 4."""
    half = head_dim // 2
    if order == "halves":
        return np.arange(head_dim)
    pairs = np.arange(half)
    if order == "interleaved_columns_first":
        pairs = np.roll(pairs, -(half // 2))
    return np.stack([pairs, pairs + half], axis=1).reshape(-1)


def from_rope_order(state: Mapping[str, np.ndarray], order: RopeOrder, num_heads: int) -> State:
    """Permute the channels of queries and keys from another program's order to ours.

    A state whose heads have no multiple of 4 channels stays as it is: it has no rotary positions.
    """
    return _permuted(state, order, num_heads, inverse=True)


def to_rope_order(state: Mapping[str, np.ndarray], order: RopeOrder, num_heads: int) -> State:
    """Permute the channels of queries and keys from our order to another program's; inverse of `from_rope_order`."""
    return _permuted(state, order, num_heads, inverse=False)


# Of blocks, and not of attention pooling; with the number of parts of which the first two have an order of channels.
_QUERIES_AND_KEYS = (
    (re.compile(r"blocks\.\d+\.attn\.qkv\.(weight|bias)"), 3),
    (re.compile(r"blocks\.\d+\.attn\.(q\.bias|[qk]_norm\.(weight|bias))"), 1),
)


def _permuted(state: Mapping[str, np.ndarray], order: RopeOrder, num_heads: int, *, inverse: bool) -> State:
    permuted = dict(state)
    if order == "halves":
        return permuted
    for name, array in state.items():
        num_parts = next((parts for pattern, parts in _QUERIES_AND_KEYS if pattern.fullmatch(name)), None)
        if num_parts is None:
            continue
        head_dim = array.shape[-1] if "_norm." in name else array.shape[-1] // num_parts // num_heads
        if head_dim == 0 or head_dim % 4 or array.shape[-1] % (num_parts * head_dim):
            continue
        channels = channel_order(order, head_dim)
        channels = np.argsort(channels) if inverse else channels
        parts = np.split(array, num_parts, axis=-1)
        permuted[name] = np.concatenate([_permute_heads(part, channels) for part in parts[:2]] + parts[2:], axis=-1)
    return permuted


def _permute_heads(array: np.ndarray, channels: np.ndarray) -> np.ndarray:
    heads = array.reshape(*array.shape[:-1], -1, len(channels))
    return np.ascontiguousarray(heads[..., channels]).reshape(array.shape)

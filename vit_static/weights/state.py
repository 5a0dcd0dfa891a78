"""States of weights: arrays by name, in the files' layout and in the layers'.

The files' layout is that of PLSC's files, with the names of this program's options beside it:

    cls_token, dist_token [1, 1, C]   reg_token [1, R, C]   pos_embed [1, positions, C]
    patch_embed.proj.weight [C, channels, p, p]  .bias
    blocks.N.norm1, .norm2; .attn.qkv [C, 3 C], .attn.proj; .mlp.fc1, .mlp.fc2; .ls1.gamma, .ls2.gamma
    norm   head0 (the tanh layer)   head, head_dist   linear layers are [in, out]

The layers have three separate projections, attn.q, attn.k and attn.v, instead of attn.qkv.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

State = dict[str, np.ndarray]  # float32


def fuse_qkv(state: Mapping[str, np.ndarray]) -> State:
    """Convert the layers' names to the files': concatenate ``attn.{q,k,v}.*`` to ``attn.qkv.*`` along the last axis.

    Biases stay separate where keys have none. Raises KeyError if one of the three is missing, ValueError if their
    shapes differ.
    """
    fused = {}
    for name, value in state.items():
        if _is_bias_without_that_of_keys(name, state):
            fused[name] = value
        elif ".attn.q." in name:
            parts = [state[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"{name} has the shape {list(parts[0].shape)}, unlike the others")
            fused[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate(parts, axis=-1)
        elif ".attn.k." not in name and ".attn.v." not in name:
            fused[name] = value
        elif name.replace(".attn.k.", ".attn.q.").replace(".attn.v.", ".attn.q.") not in state:
            raise KeyError(name)
    return fused


def _is_bias_without_that_of_keys(name: str, state: Mapping[str, np.ndarray]) -> bool:
    """Return whether a name is that of the queries' or values' biases in a model with `qkv_bias: qv`."""
    match = re.fullmatch(r"(.*\.attn\.)[qv]\.bias", name)
    return match is not None and all((f"{match[1]}{part}.bias" in state) == (part != "k") for part in "qkv")


def split_qkv(state: Mapping[str, np.ndarray]) -> State:
    """Convert the files' names to the layers'; the inverse of `fuse_qkv`."""
    split = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for part, columns in zip("qkv", np.split(value, 3, axis=-1), strict=True):
                split[name.replace(".attn.qkv.", f".attn.{part}.")] = columns
        else:
            split[name] = value
    return split

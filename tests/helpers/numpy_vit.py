"""Forward pass of the Vision Transformer in NumPy, in float64, from the paper's equations.

Independent of the model: it loops over heads, writes out the softmax, and computes the patch embedding as a
convolution.
"""

from __future__ import annotations

import math

import numpy as np


def logits(
    state: dict[str, np.ndarray],
    images: np.ndarray,
    *,
    patch_size: int,
    num_heads: int,
    attention: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Compute logits [B, K] from images [B, 3, height, width] and the weights as they are in files.

    The weights determine the layers; the head reads the class token if there is one, else the mean of the patches. The
    attention weights of each layer, [B, H, N, N], are appended to `attention`.
    """
    state = {name: value.astype(np.float64) for name, value in state.items()}
    x = _embed(state, images.astype(np.float64), patch_size)
    class_token_pos_embed = state["pos_embed"].shape[1] > x.shape[1]
    if not class_token_pos_embed:
        x = x + state["pos_embed"]
    if "cls_token" in state:
        x = np.concatenate([np.repeat(state["cls_token"], len(x), axis=0), x], axis=1)
    if class_token_pos_embed:
        x = x + state["pos_embed"]
    registers = state.get("reg_token", np.zeros((1, 0, x.shape[2])))
    x = np.concatenate([np.repeat(registers, len(x), axis=0), x], axis=1)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for index in range(depth):
        block = {name.split(".", 2)[2]: value for name, value in state.items() if name.startswith(f"blocks.{index}.")}
        x = x + block.get("ls1.gamma", 1.0) * _attend(
            block, _norm(x, block["norm1.weight"], block["norm1.bias"]), num_heads, attention
        )
        hidden = _norm(x, block["norm2.weight"], block["norm2.bias"]) @ block["mlp.fc1.weight"] + block["mlp.fc1.bias"]
        erf = np.vectorize(math.erf)(hidden / math.sqrt(2.0))
        x = x + block.get("ls2.gamma", 1.0) * (
            (0.5 * hidden * (1.0 + erf)) @ block["mlp.fc2.weight"] + block["mlp.fc2.bias"]
        )
    x = _norm(x, state["norm.weight"], state["norm.bias"])
    first = registers.shape[1]
    pooled = x[:, first] if "cls_token" in state else x[:, first:].mean(axis=1)
    if "head0.weight" in state:
        pooled = np.tanh(pooled @ state["head0.weight"] + state["head0.bias"])
    return pooled @ state["head.weight"] + state["head.bias"]


def _embed(state: dict[str, np.ndarray], images: np.ndarray, patch_size: int) -> np.ndarray:
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    tokens = []
    for row in range(rows):
        for column in range(columns):
            top, left = row * patch_size, column * patch_size
            patch = images[:, :, top : top + patch_size, left : left + patch_size]
            tokens.append(np.einsum("bcyx,dcyx->bd", patch, kernel) + bias)
    return np.stack(tokens, axis=1)


def _attend(
    block: dict[str, np.ndarray], x: np.ndarray, num_heads: int, attention: list[np.ndarray] | None
) -> np.ndarray:
    width = x.shape[-1]
    head_dim = width // num_heads
    qkv = x @ block["attn.qkv.weight"] + block.get("attn.qkv.bias", 0.0)
    query, key, value = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
    heads, weights = [], []
    for head in range(num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        scores = query[..., part] @ key[..., part].swapaxes(1, 2) / math.sqrt(head_dim)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights.append(powers / powers.sum(axis=-1, keepdims=True))
        heads.append(weights[-1] @ value[..., part])
    if attention is not None:
        attention.append(np.stack(weights, axis=1))
    return np.concatenate(heads, axis=-1) @ block["attn.proj.weight"] + block["attn.proj.bias"]


def _norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon) * weight + bias

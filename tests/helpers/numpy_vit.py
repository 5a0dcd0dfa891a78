"""Forward pass of the Vision Transformer in NumPy, in float64, from the paper's equations.

Independent of the model: it loops over heads, writes out the softmax, and computes the patch embedding as a
convolution.
"""

from __future__ import annotations

import math

import numpy as np

from vit_static.config.model_schema import ModelConfig


def logits(
    state: dict[str, np.ndarray],
    images: np.ndarray,
    *,
    patch_size: int,
    num_heads: int,
    attention: list[np.ndarray] | None = None,
    angles: list[np.ndarray] | None = None,
    gelu: str = "erf",
    epsilon: float = 1e-6,
) -> np.ndarray:
    """Compute logits [B, K] from images [B, 3, height, width] and the weights as they are in files.

    The weights determine the layers; the head reads attention pooling if there is any, else the class token if there is
    one, else the mean of the patches. With a distillation token the logits are the mean of two heads'. The attention
    weights of each layer, [B, H, N, N], are appended to `attention`.
    Each block turns its queries and keys by its `angles`, [N, H, d / 2].
    """
    state = {name: value.astype(np.float64) for name, value in state.items()}
    x = _embed(state, images.astype(np.float64), patch_size)
    pos_embed = state.get("pos_embed", np.zeros((1, x.shape[1], x.shape[2])))
    class_token_pos_embed = pos_embed.shape[1] > x.shape[1]
    if not class_token_pos_embed:
        x = x + pos_embed
    tokens = [np.repeat(state[name], len(x), axis=0) for name in ("cls_token", "dist_token") if name in state]
    x = np.concatenate([*tokens, x], axis=1)
    if class_token_pos_embed:
        x = x + pos_embed
    registers = state.get("reg_token", np.zeros((1, 0, x.shape[2])))
    x = np.concatenate([np.repeat(registers, len(x), axis=0), x], axis=1)
    if "norm_pre.weight" in state:
        x = _norm(x, state, "norm_pre", epsilon)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for index in range(depth):
        block = _part(state, f"blocks.{index}.")
        normalized = _norm(x, block, "norm1", epsilon)
        turned = None if angles is None else angles[index]
        x = x + block.get("ls1.gamma", 1.0) * _attend(
            _part(block, "attn."), normalized, normalized, num_heads, attention, turned, epsilon
        )
        normalized = _norm(x, block, "norm2", epsilon)
        x = x + block.get("ls2.gamma", 1.0) * _mlp(_part(block, "mlp."), normalized, gelu, epsilon)
    x = _norm(x, state, "norm", epsilon)
    first = registers.shape[1]
    if "attn_pool.latent" in state:
        pool = _part(state, "attn_pool.")
        query = np.repeat(pool["latent"], len(x), axis=0)
        y = _attend(_part(pool, "attn."), query, x, num_heads, attention, None, epsilon)
        pooled = (y + _mlp(_part(pool, "mlp."), _norm(y, pool, "norm", epsilon), gelu, epsilon))[:, 0]
    else:
        pooled = x[:, first] if "cls_token" in state else x[:, first:].mean(axis=1)
    if "head0.weight" in state:
        pooled = np.tanh(pooled @ state["head0.weight"] + state["head0.bias"])
    class_logits = pooled @ state["head.weight"] + state["head.bias"]
    if "dist_token" not in state:
        return class_logits
    return (class_logits + x[:, first + 1] @ state["head_dist.weight"] + state["head_dist.bias"]) / 2.0


def _part(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _mlp(layers: dict[str, np.ndarray], x: np.ndarray, gelu: str, epsilon: float) -> np.ndarray:
    hidden = x @ layers["fc1.weight"] + layers["fc1.bias"]
    if "gate.weight" in layers:
        gate = x @ layers["gate.weight"] + layers["gate.bias"]
        hidden = gate / (1.0 + np.exp(-gate)) * hidden
    elif gelu == "quick":
        hidden = hidden / (1.0 + np.exp(-1.702 * hidden))
    elif gelu == "tanh":
        hidden = 0.5 * hidden * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (hidden + 0.044715 * hidden**3)))
    else:
        hidden = 0.5 * hidden * (1.0 + np.vectorize(math.erf)(hidden / math.sqrt(2.0)))
    if "norm.weight" in layers:
        hidden = _norm(hidden, layers, "norm", epsilon)
    return hidden @ layers["fc2.weight"] + layers["fc2.bias"]


def rotary_angles(config: ModelConfig, state: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    """Return the angle of each pair of channels, [N, H, d / 2] for each block, from the papers' formulas.

    None without rotary positions.
    """
    if config.rope == "none" or config.num_heads is None:
        return None
    rows, columns = (side // 4 for side in config.image_size)
    num_pairs = state["norm.weight"].shape[0] // config.num_heads // 2
    blocks = []
    for block in range(config.depth or 1):
        angles = np.zeros((config.num_prefix_tokens + rows * columns, config.num_heads, num_pairs))
        for patch in range(rows * columns):
            row, column = divmod(patch, columns)
            for head in range(config.num_heads):
                for pair in range(num_pairs):
                    if config.rope == "mixed":
                        of_rows, of_columns = state[f"blocks.{block}.attn.rope.frequencies"].astype(np.float64)
                        index = head * num_pairs + pair
                        scales = np.divide(config.rope_grid or (rows, columns), (rows, columns))
                        angle = row * scales[0] * of_rows[index] + column * scales[1] * of_columns[index]
                    else:
                        exponent = (pair % (num_pairs // 2)) / (num_pairs // 2)
                        position, length = (row, rows) if pair < num_pairs // 2 else (column, columns)
                        if config.rope_grid is None:  # DINOv3
                            angle = 2 * np.pi * (2 * (position + 0.5) / length - 1) / 100.0**exponent
                        else:  # EVA-02
                            reference = config.rope_grid[0 if pair < num_pairs // 2 else 1]
                            angle = position * reference / length / (config.rope_base or 100.0) ** exponent
                    angles[config.num_prefix_tokens + patch, head, pair] = angle
        for register in range(config.register_tokens if config.rope_register_base else 0):
            for pair in range(num_pairs):
                position = divmod(register, round(config.register_tokens**0.5))[0 if pair < num_pairs // 2 else 1]
                exponent = (pair % (num_pairs // 2)) / (num_pairs // 2)
                angles[register, :, pair] = position / config.rope_register_base**exponent
        blocks.append(angles)
    return blocks


def _embed(state: dict[str, np.ndarray], images: np.ndarray, patch_size: int) -> np.ndarray:
    kernel, bias = state["patch_embed.proj.weight"], state.get("patch_embed.proj.bias", 0.0)
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    tokens = []
    for row in range(rows):
        for column in range(columns):
            top, left = row * patch_size, column * patch_size
            patch = images[:, :, top : top + patch_size, left : left + patch_size]
            tokens.append(np.einsum("bcyx,dcyx->bd", patch, kernel) + bias)
    return np.stack(tokens, axis=1)


def _attend(
    layers: dict[str, np.ndarray],
    queries: np.ndarray,
    x: np.ndarray,
    num_heads: int,
    attention: list[np.ndarray] | None,
    angles: np.ndarray | None,
    epsilon: float,
) -> np.ndarray:
    width = x.shape[-1]
    head_dim = width // num_heads
    bias = layers.get("qkv.bias", np.concatenate([layers.get(f"{part}.bias", np.zeros(width)) for part in "qkv"]))
    query, key, value = (
        tokens @ layers["qkv.weight"][:, part] + bias[part]
        for tokens, part in zip((queries, x, x), (slice(n * width, (n + 1) * width) for n in range(3)), strict=True)
    )
    heads, weights = [], []
    for head in range(num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        q, k = query[..., part], key[..., part]
        if "q_norm.weight" in layers:
            q, k = _norm(q, layers, "q_norm", epsilon), _norm(k, layers, "k_norm", epsilon)
        if angles is not None:
            q, k = (_turn(each, angles[:, head]) for each in (q, k))
        scores = q @ k.swapaxes(1, 2) / math.sqrt(head_dim)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights.append(powers / powers.sum(axis=-1, keepdims=True))
        heads.append(weights[-1] @ value[..., part])
    if attention is not None:
        attention.append(np.stack(weights, axis=1))
    out = np.concatenate(heads, axis=-1)
    if "norm.weight" in layers:
        out = _norm(out, layers, "norm", epsilon)
    return out @ layers["proj.weight"] + layers["proj.bias"]


def _turn(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Multiply the pairs of channels i and i + d / 2, as complex numbers, by exp(i angle)."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _norm(x: np.ndarray, state: dict[str, np.ndarray], name: str, epsilon: float) -> np.ndarray:
    """Apply LayerNorm or, if it has no bias, RMSNorm."""
    if f"{name}.bias" not in state:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * state[f"{name}.weight"]
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = state[f"{name}.weight"] / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return centred * scale + state[f"{name}.bias"]

"""Position embeddings: resampling to another grid of patches, and the fixed 2D sine-cosine embedding."""

from __future__ import annotations

import numpy as np

from vit_static.config.schema import PosEmbedResampling


def resample_pos_embed(
    pos_embed: np.ndarray,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    mode: PosEmbedResampling = "bicubic",
) -> np.ndarray:
    """Resample a position embedding [1, prefix + rows * columns, C] to another grid; grids are (rows, columns).

    The prefix (positions beyond the old grid, such as the class token's) is returned unchanged. The result is float32.
    Each mode reproduces the program that weights come from:
    bicubic: half-pixel centers and a = -0.75, as PLSC and torch's `interpolate`.
    bilinear: aligned corners, as `scipy.ndimage.zoom(order=1)` in Google's code.
    antialias: Pillow's bicubic (a = -0.5), with a wider kernel if the grid shrinks, as timm's `resample_abs_pos_embed`.
    """
    num_prefix_tokens = pos_embed.shape[1] - old_grid[0] * old_grid[1]
    prefix, table = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    table = table.reshape(*old_grid, -1).astype(np.float64)
    rows, columns = (resampling_matrix(old, new, mode) for old, new in zip(old_grid, new_grid, strict=True))
    resampled = np.einsum("ij,jkc->ikc", rows, np.einsum("lk,jkc->jlc", columns, table))
    resampled = resampled.reshape(1, new_grid[0] * new_grid[1], -1)
    return np.concatenate([prefix, resampled], axis=1).astype(np.float32)


def resampling_matrix(old: int, new: int, mode: PosEmbedResampling) -> np.ndarray:
    """Return the weights of the `old` points in each of the `new` points along one axis, [new, old] float64."""
    points = np.arange(old)
    if mode == "bilinear":
        centers = np.linspace(0.0, old - 1.0, new) if new > 1 else np.zeros(1)
        return np.maximum(1.0 - np.abs(centers[:, None] - points), 0.0)
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    if mode == "antialias":
        widening = max(old / new, 1.0)
        weights = _cubic((centers[:, None] - points) / widening, a=-0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    # Four points contribute; those beyond the edge are replaced by the edge.
    matrix = np.zeros((new, old))
    for row, center in enumerate(centers):
        for point in int(np.floor(center)) + np.arange(-1, 3):
            matrix[row, np.clip(point, 0, old - 1)] += _cubic(np.array(center - point), a=-0.75)
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Evaluate the cubic convolution kernel (Keys 1981), which is 0 beyond 2."""
    x = np.abs(x)
    near = (a + 2.0) * x**3 - (a + 3.0) * x**2 + 1.0
    far = a * (x**3 - 5.0 * x**2 + 8.0 * x - 4.0)
    return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))


def sincos2d_pos_embed(grid: tuple[int, int], width: int, num_prefix_tokens: int = 0) -> np.ndarray:
    """Return the fixed embedding of 'Better plain ViT' (arXiv 2205.01580), [1, prefix + rows * columns, width] float32.

    Four equal groups of channels: sine and cosine of the column, sine and cosine of the row, at frequencies
    1 / 10000**(i / (width / 4 - 1)). Prefix tokens get zeros. `width` must be a multiple of 4.
    """
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    frequencies = 10000.0 ** -(np.arange(width // 4) / max(width // 4 - 1, 1))
    row_angles = rows.reshape(-1, 1) * frequencies  # [rows * columns, width / 4]
    column_angles = columns.reshape(-1, 1) * frequencies
    table = np.concatenate(
        [np.sin(column_angles), np.cos(column_angles), np.sin(row_angles), np.cos(row_angles)], axis=1
    )
    return np.concatenate([np.zeros((num_prefix_tokens, width)), table])[None].astype(np.float32)

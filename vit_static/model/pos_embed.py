"""A learned position embedding on another grid of patches, by the arithmetic of the programs that weights come from."""

from __future__ import annotations

import numpy as np

from vit_static.config.schema import PosEmbedResampling


def resample_pos_embed(
    pos_embed: np.ndarray,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    mode: PosEmbedResampling = "bicubic",
) -> np.ndarray:
    """[1, prefix + rows * columns, C] in and out, float32; grids are (rows, columns).

    Prefix tokens (what the embedding holds beyond the old grid) are kept as they are. `mode`:
    bicubic: between half-pixel centres, a = -0.75, as the seed and torch's `interpolate`; bilinear: corner on corner,
    as `scipy.ndimage.zoom(order=1)` in Google's code; antialias: Pillow's bicubic (a = -0.5), widened where the grid
    shrinks, as timm's `resample_abs_pos_embed`.
    """
    num_prefix_tokens = pos_embed.shape[1] - old_grid[0] * old_grid[1]
    prefix, table = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    table = table.reshape(*old_grid, -1).astype(np.float64)
    rows, columns = (resampling_matrix(old, new, mode) for old, new in zip(old_grid, new_grid, strict=True))
    resampled = np.einsum("ij,jkc->ikc", rows, np.einsum("lk,jkc->jlc", columns, table))
    resampled = resampled.reshape(1, new_grid[0] * new_grid[1], -1)
    return np.concatenate([prefix, resampled], axis=1).astype(np.float32)


def resampling_matrix(old: int, new: int, mode: PosEmbedResampling) -> np.ndarray:
    """Along one axis: the weights of `old` points in each of `new`, [new, old], float64."""
    places = np.arange(old)  # of what is read
    if mode == "bilinear":
        centres = np.linspace(0.0, old - 1.0, new) if new > 1 else np.zeros(1)
        return np.maximum(1.0 - np.abs(centres[:, None] - places), 0.0)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    if mode == "antialias":
        widening = max(old / new, 1.0)
        weights = _cubic((centres[:, None] - places) / widening, a=-0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    # Without antialiasing four points are read, those beyond the edge from the edge.
    matrix = np.zeros((new, old))
    for row, centre in enumerate(centres):
        for place in int(np.floor(centre)) + np.arange(-1, 3):
            matrix[row, np.clip(place, 0, old - 1)] += _cubic(np.array(centre - place), a=-0.75)
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981), 0 beyond 2."""
    x = np.abs(x)
    near = (a + 2.0) * x**3 - (a + 3.0) * x**2 + 1.0
    far = a * (x**3 - 5.0 * x**2 + 8.0 * x - 4.0)
    return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))


def sincos2d_pos_embed(grid: tuple[int, int], width: int, num_prefix_tokens: int = 0) -> np.ndarray:
    """The fixed embedding of 'Better plain ViT' (arXiv 2205.01580), [1, prefix + rows * columns, width], float32.

    A quarter of the channels each: sine and cosine of the column, sine and cosine of the row, at frequencies
    1 / 10000**(i / (width / 4 - 1)). Prefix tokens get zeros. 4 must divide the width.
    """
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    frequencies = 10000.0 ** -(np.arange(width // 4) / max(width // 4 - 1, 1))
    row_angles = rows.reshape(-1, 1) * frequencies  # [rows * columns, width / 4]
    column_angles = columns.reshape(-1, 1) * frequencies
    table = np.concatenate(
        [np.sin(column_angles), np.cos(column_angles), np.sin(row_angles), np.cos(row_angles)], axis=1
    )
    return np.concatenate([np.zeros((num_prefix_tokens, width)), table])[None].astype(np.float32)

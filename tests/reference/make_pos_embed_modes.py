"""Make pos_embed_modes.npz: position embeddings resampled by vit_jax's and timm's arithmetic.

`input` [1, 1 + 3 * 5, 6], with the class token's row first. For each grid of 4x7, 2x3, 6x10 (rows x columns), the
results [1, 1 + rows * columns, 6]: `bilinear/GRID`, by scipy.ndimage.zoom(order=1) with vit_jax's factors new / old,
and `antialias/GRID`, by timm's resample_abs_pos_embed. Both keep the first row. (pos_embed.npz contains the resampling
of torch, without antialiasing.)
"""

from pathlib import Path

import golden
import numpy as np
import scipy.ndimage
import torch
from timm.layers import resample_abs_pos_embed

GRID, WIDTH = (3, 5), 6
NEW_GRIDS = [(4, 7), (2, 3), (6, 10)]


def main() -> None:
    rng = np.random.default_rng(20261123)
    pos_embed = rng.standard_normal((1, 1 + GRID[0] * GRID[1], WIDTH)).astype(np.float32)
    table = pos_embed[0, 1:].reshape(*GRID, WIDTH).astype(np.float64)
    arrays = {"input": pos_embed}
    for new in NEW_GRIDS:
        zoomed = scipy.ndimage.zoom(table, (new[0] / GRID[0], new[1] / GRID[1], 1), order=1)
        assert zoomed.shape == (*new, WIDTH)
        name = f"{new[0]}x{new[1]}"
        arrays[f"bilinear/{name}"] = np.concatenate([pos_embed[:, :1], zoomed.reshape(1, -1, WIDTH)], axis=1)
        resampled = resample_abs_pos_embed(
            torch.from_numpy(pos_embed).double(), new_size=list(new), old_size=list(GRID), num_prefix_tokens=1
        )
        arrays[f"antialias/{name}"] = resampled.numpy()
    golden.write(Path(__file__).with_name("pos_embed_modes.npz"), arrays)


if __name__ == "__main__":
    main()

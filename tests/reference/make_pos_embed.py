"""Make pos_embed.npz: grids of position embeddings resampled by torch's interpolate, in float64.

For each CASE of `4x4_to_6x6`, `4x6_to_7x5`, `8x8_to_5x5` (height x width): `CASE/input`
[1, H, W, 6] float32, without a class token, and the results [1, H', W', 6] of F.interpolate with
align_corners=False: `CASE/bicubic`, `CASE/bilinear` (antialias=False), `CASE/bicubic_antialias`.

torch's bicubic kernel has a = -0.75 without antialias and a = -0.5 (Pillow's) with it, so the two
differ even where a grid grows. Results are float64 rounded to float32.
"""

from pathlib import Path

import golden
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

SEED = 20240819
WIDTH = 6
CASES = [((4, 4), (6, 6)), ((4, 6), (7, 5)), ((8, 8), (5, 5))]


def resample(
    grid: npt.NDArray[np.float32], size: tuple[int, int], mode: str, antialias: bool
) -> npt.NDArray[np.float64]:
    """Resample [1, H, W, D] to [1, *size, D]."""
    channels_first = torch.from_numpy(grid).double().permute(0, 3, 1, 2)  # [1, D, H, W]
    resized = F.interpolate(channels_first, size=size, mode=mode, align_corners=False, antialias=antialias)
    return resized.permute(0, 2, 3, 1).numpy()  # [1, H', W', D]


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    arrays: dict[str, npt.ArrayLike] = {}
    for source, target in CASES:
        case = f"{source[0]}x{source[1]}_to_{target[0]}x{target[1]}"
        grid = rng.standard_normal((1, *source, WIDTH)).astype(np.float32)
        arrays[f"{case}/input"] = grid
        arrays[f"{case}/bicubic"] = resample(grid, target, "bicubic", antialias=False)
        arrays[f"{case}/bilinear"] = resample(grid, target, "bilinear", antialias=False)
        arrays[f"{case}/bicubic_antialias"] = resample(grid, target, "bicubic", antialias=True)
    golden.write(Path(__file__).with_name("pos_embed.npz"), arrays)


if __name__ == "__main__":
    main()

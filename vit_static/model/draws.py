"""Values that all blocks of a step share: the random choices of training (the patches that remain, and changes of their
coordinates), and the size of the images if it isn't the model's.

The choices are computed from uniform numbers by NumPy, so that a caller that gives each image numbers of its own gets
the same choices on any mesh and after any resume (program/seeded_draws.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from vit_static.config.model_schema import ModelConfig
from vit_static.model.variants import grid_of, num_kept_patches

ImageSize = tuple[int, int]  # height, width

NUM_BOX_NUMBERS = 5  # shifts of rows and columns, factors of both, a common factor


@dataclass(frozen=True)
class Draw:
    """What a step passes to one block; None for what the config doesn't use."""

    # The tokens of each image that remain: the prefix tokens, then patches in ascending order.
    tokens: paddle.Tensor | None = None  # [B, prefix + kept patches] int32
    box: paddle.Tensor | None = None  # [2, 2] float32: a factor of the coordinates and a summand, of rows and columns
    image_size: ImageSize | None = None  # where it isn't the model's


# (images in the batch, their size) -> a draw per block
DrawFunction = Callable[[int, ImageSize], list[Draw]]


def uses_patch_dropout(config: ModelConfig) -> bool:
    """Return whether training leaves out patches."""
    return config.patch_dropout > 0.0


def uses_box(config: ModelConfig) -> bool:
    """Return whether training moves the coordinates of rotary positions."""
    return config.rope_shift > 0.0 or config.rope_jitter > 1.0 or config.rope_rescale > 1.0


def kept_tokens(config: ModelConfig, uniform: np.ndarray) -> np.ndarray:
    """Return the tokens of each image that remain, [B, prefix + kept] int32, from uniform numbers [B, patches]."""
    patches = np.sort(np.argsort(uniform, axis=1, kind="stable")[:, : num_kept_patches(config)], axis=1)
    prefix = np.broadcast_to(np.arange(config.num_prefix_tokens), (len(patches), config.num_prefix_tokens))
    return np.concatenate([prefix, patches + config.num_prefix_tokens], axis=1).astype(np.int32)


def coordinate_box(config: ModelConfig, uniform: np.ndarray) -> np.ndarray:
    """Return the factor and the summand of the coordinates, [2, 2] float32, from NUM_BOX_NUMBERS uniform numbers.

    As in DINOv3 (arXiv 2508.10104): a uniform shift of each axis, then a log-uniform factor of each, then one of both.
    """
    signed = 2.0 * uniform - 1.0
    shift = config.rope_shift * signed[:2]
    factor = config.rope_jitter ** signed[2:4] * config.rope_rescale ** signed[4]
    return np.stack([factor, factor * shift]).astype(np.float32)


def at_size(config: ModelConfig, image_size: ImageSize) -> ModelConfig:
    """Return the config of the same model for images of another size."""
    return config if config.image_size == image_size else config.model_copy(update={"image_size": image_size})


def draw_here(config: ModelConfig, depth: int, num_images: int, image_size: ImageSize) -> list[Draw]:
    """Return the draws of a step outside of a compiled program, by Paddle's generator."""
    config = at_size(config, image_size)
    rng = np.random.default_rng(paddle.randint(0, 2**31 - 1, [1]).item())
    rows, columns = grid_of(config)
    tokens: Any = None
    box: Any = None
    if uses_patch_dropout(config):
        tokens = paddle.to_tensor(kept_tokens(config, rng.random((num_images, rows * columns))))
    if uses_box(config):
        box = paddle.to_tensor(coordinate_box(config, rng.random(NUM_BOX_NUMBERS)))
    return [Draw(tokens, box)] * depth

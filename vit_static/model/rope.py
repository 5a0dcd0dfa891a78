"""Rotary position embedding (RoFormer, arXiv 2104.09864) of patches in two dimensions (arXiv 2403.13298).

A head's d channels are d / 2 pairs: channel i and channel i + d / 2. Queries and keys turn each pair by an angle that
is linear in the token's position, row * f + column * g, so scores depend on differences of positions. Other programs
pair channels 2 i and 2 i + 1, or let the column's pairs come first; permuting the columns of the query and key
projections changes one into the other.
"""

from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Assign

from vit_static.config.model_schema import ModelConfig
from vit_static.model.draws import Draw, at_size, uses_box, uses_patch_dropout
from vit_static.model.layers import to_dtype
from vit_static.model.variants import Variant, grid_of

DEFAULT_BASES = {"axial": 100.0, "mixed": 10.0}  # of `rope_base`, by `rope`

# cosines and signed sines, each [B or 1, N, H or 1, d] float32
Rotation = tuple[paddle.Tensor, paddle.Tensor]


class RotaryPositions(nn.Layer):
    """The angles by which a block's attention turns its queries and keys, as cosines and sines.

    Tokens without a position don't turn: the class token, and registers without `rope_register_base`. With `rope:
    mixed` the frequencies are parameters, [2, C / 2]: of rows and columns, for the pairs of all heads. Images of
    another size than the model's have the coordinates of a model of that size.
    """

    def __init__(self, config: ModelConfig, variant: Variant) -> None:
        super().__init__()
        self.config = config
        self.head_dim = variant.width // variant.num_heads
        self.is_mixed = config.rope == "mixed"
        self.is_constant = not (self.is_mixed or uses_box(config) or uses_patch_dropout(config))
        coordinates = token_coordinates(config)
        self._register("signs", np.repeat([-1.0, 1.0], self.head_dim // 2))
        if self.is_mixed:
            start = random_frequencies(variant, config.rope_base or DEFAULT_BASES[config.rope], _generator())
            self.frequencies = self.create_parameter(list(start.shape), default_initializer=Assign(start))
        else:
            frequencies = axial_frequencies(config, self.head_dim)
            # Either the tables or what they are computed from: Paddle 3.3.1 discards what training doesn't read, even
            # if evaluation does.
            if self.is_constant:
                angles = np.tile(coordinates @ frequencies, 2)[None, :, None]  # [1, N, 1, d]
                self._register("cos", np.cos(angles))
                self._register("sin", np.sin(angles) * self.signs.numpy())
            else:
                self._register("frequencies", frequencies)
        if not self.is_constant:
            self._register("coordinates", coordinates)
            self._register("is_patch", _is_patch(coordinates, config))

    def _register(self, name: str, values: np.ndarray) -> None:
        self.register_buffer(name, _constant(values), persistable=False)

    def forward(self, draw: Draw | None = None) -> Rotation:
        tokens, box, image_size = (None, None, None) if draw is None else (draw.tokens, draw.box, draw.image_size)
        if self.is_constant and image_size is None:
            return self.cos, self.sin
        if image_size is None:
            coordinates, is_patch = self.coordinates, self.is_patch
        else:
            positions = token_coordinates(at_size(self.config, image_size))
            coordinates, is_patch = _constant(positions), _constant(_is_patch(positions, self.config))
        if box is not None:
            patches = coordinates[:, :2] * box[0] + box[1] * is_patch
            coordinates = patches if coordinates.shape[1] == 2 else paddle.concat([patches, coordinates[:, 2:]], axis=1)
        if tokens is not None:
            coordinates = F.embedding(tokens, coordinates)  # [B, N, 2]
        if self.is_constant:
            frequencies = _constant(axial_frequencies(self.config, self.head_dim))
        else:
            frequencies = to_dtype(self.frequencies, paddle.float32)
        # Not a matrix product, which mixed precision would compute in low precision.
        angles = sum(coordinates[..., axis : axis + 1] * frequencies[axis] for axis in range(frequencies.shape[0]))
        num_tokens, num_pairs = angles.shape[-2:]
        batch, heads = 1 if tokens is None else 0, num_pairs // (self.head_dim // 2)
        angles = angles.reshape([batch, num_tokens, heads, self.head_dim // 2])
        angles = paddle.stack([angles, angles], axis=3).flatten(3)  # [B or 1, N, H or 1, d]
        return paddle.cos(angles), paddle.sin(angles) * self.signs


def _constant(values: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(values.astype(np.float32))


def _is_patch(coordinates: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Return which tokens are patches, [N, 1], from the coordinates of all."""
    return np.arange(len(coordinates))[:, None] >= config.num_prefix_tokens


def rotate(x: paddle.Tensor, rotation: Rotation) -> paddle.Tensor:
    """Turn the pairs of channels of queries or keys [B, N, H, d]. Computes in float32."""
    cos, sin = rotation
    in_float32 = to_dtype(x, paddle.float32)
    swapped = paddle.roll(in_float32, x.shape[-1] // 2, axis=-1)
    return to_dtype(in_float32 * cos + swapped * sin, x.dtype)


def token_coordinates(config: ModelConfig) -> np.ndarray:
    """Return the row and the column of each token, [N, 2] float64: registers, class token, patches.

    Prefix tokens have 0. With `rope_register_base` there are two more columns, with the registers' own positions.
    """
    grid = grid_of(config)
    if config.rope == "axial" and config.rope_grid is None:
        axes = [(2 * np.arange(length) + 1) / length - 1.0 for length in grid]
    else:
        references = config.rope_grid or grid
        axes = [np.arange(length) * reference / length for length, reference in zip(grid, references, strict=True)]
    patches = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    coordinates = np.concatenate([np.zeros((config.num_prefix_tokens, 2)), patches])
    if config.rope_register_base is None:
        return coordinates
    of_registers = np.zeros_like(coordinates)
    side = round(config.register_tokens**0.5)
    of_registers[: config.register_tokens] = np.stack(np.divmod(np.arange(side * side), side), axis=1)
    return np.concatenate([coordinates, of_registers], axis=1)


def axial_frequencies(config: ModelConfig, head_dim: int) -> np.ndarray:
    """Return the angle per unit of each coordinate, [number of coordinates, d / 2] float64.

    The first half of the pairs turns with the row and the second with the column, both by base ** -(4 i / d), times
    2 pi for coordinates from -1 to 1.
    """
    exponents = -np.arange(head_dim // 4) / (head_dim // 4)
    frequencies = np.kron(np.eye(2), (config.rope_base or DEFAULT_BASES[config.rope]) ** exponents)
    if config.rope_grid is None:
        frequencies *= 2.0 * math.pi
    if config.rope_register_base is None:
        return frequencies
    return np.concatenate([frequencies, np.kron(np.eye(2), config.rope_register_base**exponents)])


def random_frequencies(variant: Variant, base: float, rng: np.random.Generator) -> np.ndarray:
    """Return initial frequencies of mixed positions, [2, C / 2] float32: of rows and of columns (arXiv 2403.13298).

    Each head has the frequencies base ** -(4 i / d) along two perpendicular directions, turned by a random angle.
    """
    head_dim = variant.width // variant.num_heads
    magnitudes = base ** (-np.arange(head_dim // 4) / (head_dim // 4))
    angles = rng.uniform(0.0, 2.0 * math.pi, (variant.num_heads, 1))
    directions = np.concatenate([angles, angles + math.pi / 2], axis=1)  # [H, 2]
    along_columns, along_rows = (  # as in the paper's code, where x is the column
        (function(directions)[:, :, None] * magnitudes).reshape(-1) for function in (np.cos, np.sin)
    )
    return np.stack([along_rows, along_columns]).astype(np.float32)


def _generator() -> np.random.Generator:
    """Return a generator that Paddle's seed determines."""
    return np.random.default_rng(paddle.randint(0, 2**31 - 1, [1]).item())

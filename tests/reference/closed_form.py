"""Reference inputs that are too large to store, computed by NumPy from a name and a shape.

`uniform` is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators"), seeded with crc32(name). It is integer arithmetic modulo 2**64 and one exact
conversion, so unlike np.random's distributions or np.sin, whose last bit may change with NumPy's
version or the CPU, it gives the same bits everywhere.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NUM_DIRECTIONS = 8


def uniform(name: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return pseudo-random values in (-1, 1), in C order, never 0; each is exact in float32.

    Element i is output i of SplitMix64 with the seed crc32(name) * 2**32: its upper 24 bits k
    become (2k + 1 - 2**24) / 2**24. The variance is 1/3.
    """
    seed = np.uint64(zlib.crc32(name.encode()) << 32)
    counter = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    bits = seed + counter * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = bits ^ (bits >> np.uint64(31))
    odd = 2 * (bits >> np.uint64(40)).astype(np.int64) + 1 - 2**24
    value: npt.NDArray[np.float64] = odd / 2**24
    return value.astype(np.float32).reshape(shape)


def vit_parameter(name: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return a ViT parameter by its PLSC name, in Paddle's layout (a Linear weight is [in, out]).

    With u = uniform(name, shape), computed in float64 and rounded once to float32:

    - a weight of two or more axes (Linear, convolution): u * sqrt(3 / fan_in), of variance 1/fan_in
    - a LayerNorm weight: 1 + u/2
    - a bias: u/2
    - tokens, `pos_embed`, LayerScale factors, a pooling head's query, rotary frequencies: u
    """
    value = uniform(name, shape).astype(np.float64)
    if name.endswith(".weight") and len(shape) == 1:
        value = 1 + value / 2
    elif name.endswith(".weight"):
        fan_in = shape[0] if len(shape) == 2 else math.prod(shape[1:])
        value = value * math.sqrt(3 / fan_in)
    elif name.endswith(".bias"):
        value = value / 2
    elif name not in ("cls_token", "reg_token", "pos_embed") and not name.endswith(
        (".gamma", ".latent", ".frequencies")
    ):
        raise ValueError(f"no closed form for the parameter {name!r}")
    return value.astype(np.float32)


def project(name: str, gradient: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the dot products, in float64, of a gradient with its NUM_DIRECTIONS fixed directions.

    Direction j is uniform(f"{name}/direction{j}", gradient.shape), in the gradient's layout. An
    error e in the gradient shows as about |e| / sqrt(3) in each: compare with the gradient's norm,
    not with the projection, which may happen to be near 0.
    """
    gradient64 = np.asarray(gradient, dtype=np.float64)
    return np.array(
        [np.sum(gradient64 * uniform(f"{name}/direction{j}", gradient64.shape)) for j in range(NUM_DIRECTIONS)]
    )

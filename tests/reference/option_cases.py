"""Small models with rotary positions and other options, of which option_gradients.npz has the gradients by timm.

`OURS` has the keys of the `model` section, as they differ from `COMMON`, and the shapes of the parameters by the names
in this program's files.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH, HEADS, HIDDEN, CLASSES = 24, 3, 48, 5
IMAGE_SIZE = (12, 16)  # height, width; 3 x 4 patches of 4 pixels
COMMON: dict[str, Any] = {
    "variant": "Ti/16",
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
    "width": WIDTH,
    "depth": 1,
    "num_heads": HEADS,
    "mlp_dim": HIDDEN,
    "num_classes": CLASSES,
}
Shapes = dict[str, tuple[int, ...]]


def labels() -> npt.NDArray[np.int64]:
    """Return the labels of the three images."""
    return np.array([3, 0, 4])


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int = WIDTH, *, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (width,)}
    return shapes | {f"{name}.bias": (width,)} if bias else shapes


def _block(
    name: str,
    *,
    qkv_bias: bool | str = True,
    gated: bool = False,
    norms: tuple[str, ...] = (),
    norm_bias: bool = True,
    scales: bool = False,
    mixed: bool = False,
) -> Shapes:
    """Return the parameters of a block. `norms`: the optional ones."""
    shapes = _norm(f"{name}.norm1", bias=norm_bias) | _norm(f"{name}.norm2", bias=norm_bias)
    shapes[f"{name}.attn.qkv.weight"] = (WIDTH, 3 * WIDTH)
    if qkv_bias == "qv":
        shapes |= {f"{name}.attn.{part}.bias": (WIDTH,) for part in "qv"}
    elif qkv_bias:
        shapes[f"{name}.attn.qkv.bias"] = (3 * WIDTH,)
    shapes |= _linear(f"{name}.attn.proj", WIDTH, WIDTH)
    for layer in ("fc1", "gate") if gated else ("fc1",):
        shapes |= _linear(f"{name}.mlp.{layer}", WIDTH, HIDDEN)
    shapes |= _linear(f"{name}.mlp.fc2", HIDDEN, WIDTH)
    widths = {"attn.q_norm": WIDTH // HEADS, "attn.k_norm": WIDTH // HEADS, "attn.norm": WIDTH, "mlp.norm": HIDDEN}
    for norm in norms:
        shapes |= _norm(f"{name}.{norm}", widths[norm], bias=norm_bias)
    if scales:
        shapes |= {f"{name}.ls{branch}.gamma": (WIDTH,) for branch in (1, 2)}
    if mixed:
        shapes[f"{name}.attn.rope.frequencies"] = (2, WIDTH // 2)
    return shapes


def _ends(
    *, positions: int, tokens: bool = True, registers: int = 0, bias: bool = True, norm_bias: bool = True
) -> Shapes:
    """Return the parameters outside of the blocks."""
    shapes: Shapes = {"patch_embed.proj.weight": (WIDTH, 3, 4, 4)}
    if bias:
        shapes["patch_embed.proj.bias"] = (WIDTH,)
    if tokens:
        shapes["cls_token"] = (1, 1, WIDTH)
    if registers:
        shapes["reg_token"] = (1, registers, WIDTH)
    if positions:
        shapes["pos_embed"] = (1, positions, WIDTH)
    return shapes | _norm("norm", bias=norm_bias) | _linear("head", WIDTH, CLASSES)


_POOL = {"attn_pool.latent": (1, 1, WIDTH), "attn_pool.attn.qkv.weight": (WIDTH, 3 * WIDTH)}
_POOL |= {"attn_pool.attn.qkv.bias": (3 * WIDTH,)} | _linear("attn_pool.attn.proj", WIDTH, WIDTH)
_POOL |= _norm("attn_pool.norm")
_POOL |= _linear("attn_pool.mlp.fc1", WIDTH, HIDDEN) | _linear("attn_pool.mlp.fc2", HIDDEN, WIDTH)
_QK_NORMS = ("attn.q_norm", "attn.k_norm")

OURS: dict[str, dict[str, Any]] = {
    "dinov3": {
        "keys": {
            "rope": "axial",
            "pos_embed": "none",
            "register_tokens": 4,
            "layer_scale_init": 1e-5,
            "mlp": "swiglu",
            "qkv_bias": "qv",
        },
        "shapes": _ends(positions=0, registers=4) | _block("blocks.0", qkv_bias="qv", gated=True, scales=True),
    },
    "eva02": {
        "keys": {
            "rope": "axial",
            "rope_base": 10000.0,
            "rope_grid": (4, 4),
            "mlp": "swiglu",
            "mlp_norm": True,
            "attention_norm": True,
            "qkv_bias": "qv",
        },
        "shapes": _ends(positions=13) | _block("blocks.0", qkv_bias="qv", gated=True, norms=("attn.norm", "mlp.norm")),
    },
    "mixed": {
        "keys": {"rope": "mixed", "depth": 2, "qk_norm": True, "class_token_pos_embed": False},
        "shapes": _ends(positions=12)
        | _block("blocks.0", norms=_QK_NORMS, mixed=True)
        | _block("blocks.1", norms=_QK_NORMS, mixed=True),
    },
    "rms": {
        "keys": {
            "rope": "axial",
            "rope_grid": (3, 4),
            "pos_embed": "none",
            "norm": "rms",
            "qk_norm": True,
        },
        "shapes": _ends(positions=0, norm_bias=False) | _block("blocks.0", norms=_QK_NORMS, norm_bias=False),
    },
    "siglip": {
        "keys": {"pool": "map", "gelu": "tanh"},
        "shapes": _ends(positions=12, tokens=False) | _block("blocks.0") | _POOL,
    },
    "clip": {
        "keys": {"pre_norm": True, "gelu": "quick", "layer_norm_epsilon": 1e-5},
        "shapes": _ends(positions=13, bias=False) | _norm("norm_pre") | _block("blocks.0"),
    },
}

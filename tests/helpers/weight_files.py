"""Small weight files that other programs have written, with their logits (tests/reference)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from helpers.small import REFERENCE
from vit_static.config.model_schema import ModelConfig
from vit_static.weights.formats import ExternalWeights, read_weights
from vit_static.weights.infer import infer_config

WEIGHTS = REFERENCE / "weights"
FILES = {
    **{name: f"{name}.safetensors" for name in ("timm_vit", "timm_avg_fc_norm", "timm_gap_no_class")},
    **{name: f"{name}.safetensors" for name in ("timm_deit3", "timm_dinov2_reg", "timm_deit_distilled")},
    **{
        name: f"{name}/model.safetensors"
        for name in ("hf_vit", "hf_dinov2", "hf_dinov2_registers", "hf_deit_distilled")
    },
    **{name: f"{name}.npz" for name in ("vit_jax", "vit_jax_gap")},
    **{name: f"{name}.npz" for name in ("big_vision_tok", "big_vision_gap_sincos", "big_vision_scan")},
    **{name: f"{name}.npz" for name in ("big_vision_map", "big_vision_siglip")},
    **{name: f"{name}.pdparams" for name in ("plsc", "plsc_fp16", "plsc_finetuned", "paddleclas")},
}
# Image towers that were trained with texts; what they compute is in towers.npz.
TOWERS = {
    **{name: f"{name}.safetensors" for name in ("timm_siglip", "openai_clip", "eva_clip")},
    "open_clip": "open_clip/open_clip_model.safetensors",
    **{name: f"{name}/model.safetensors" for name in ("timm_clip", "hf_clip", "hf_clip_vision", "hf_clip_projection")},
    **{name: f"{name}/model.safetensors" for name in ("hf_siglip", "hf_siglip_classifier", "hf_siglip2_naflex")},
}
PATCH_SIZE = 4
IMAGE_SIZE = (12, 20)  # of those whose grid isn't square, which no array determines
_NOT_SQUARE = {
    *("timm_vit", "timm_gap_no_class", "vit_jax", "vit_jax_gap"),
    *("big_vision_tok", "big_vision_gap_sincos", "big_vision_scan", "big_vision_map", "big_vision_siglip"),
    *("timm_siglip", "timm_clip", "open_clip"),
}


def reference_logits(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images and the logits of the program that wrote the file."""
    framework = {"vit": "jax", "big": "jax", "plsc": "paddle", "paddleclas": "paddle"}.get(name.split("_")[0], "torch")
    framework = "towers" if name in TOWERS else framework
    framework = "deit" if name.endswith("_distilled") else framework
    arrays = np.load(WEIGHTS / f"{framework}.npz")
    return arrays[f"{name}/images"], arrays[f"{name}/logits"]


def read_with_model(name: str, *overrides: str) -> tuple[ExternalWeights, ModelConfig]:
    """Read a file, and return it with the model that fits it."""
    external = read_weights(WEIGHTS / (FILES | TOWERS)[name])
    image_size = IMAGE_SIZE if name in _NOT_SQUARE else None
    # No variant has this shape, and timm's and Paddle's files don't determine the number of heads.
    num_heads = 2 if name == "eva_clip" else 4
    return external, infer_config(external, name, [f"model.num_heads={num_heads}", *overrides], image_size).model


def patch_grid(config: ModelConfig) -> tuple[int, int]:
    """Return the rows and columns of patches of a file's model."""
    return config.image_size[0] // PATCH_SIZE, config.image_size[1] // PATCH_SIZE


def safetensors_entries(path: Path) -> dict[str, Any]:
    """Return the shape, dtype and data of each array."""
    return dict(safetensors.deserialize(path.read_bytes()))


def save_changed(
    path: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], name: str = "timm_vit"
) -> Path:
    """Write a .safetensors file again with what `change` makes of its arrays."""
    arrays = {
        key: np.frombuffer(entry["data"], "<f4").reshape(entry["shape"])
        for key, entry in safetensors_entries(WEIGHTS / (FILES | TOWERS)[name]).items()
    }
    save_file(change(arrays), path)
    return path

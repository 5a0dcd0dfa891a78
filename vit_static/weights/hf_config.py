"""Hugging Face's config.json next to a weight file: what it says about the model, and one for files that this
program writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common.errors import WeightsError, format_value
from vit_static.config.model_schema import ModelConfig
from vit_static.weights.tables.plsc import PLSC


def read_hints(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return hints about the model from the content of a config.json. Raises WeightsError for impossible values."""
    model_hints: dict[str, Any] = {}
    for theirs, ours, kind, maximum in (
        ("num_attention_heads", "num_heads", int, 10_000),
        ("layer_norm_eps", "layer_norm_epsilon", float, 1.0),
    ):
        if type(config.get(theirs)) is kind:
            if not 0 < config[theirs] <= maximum:
                raise WeightsError(f"{path}: {theirs} is {format_value(config[theirs])}, which no model has")
            model_hints[ours] = config[theirs]
    activation = config.get("hidden_act", "gelu")
    if activation in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        model_hints["gelu"] = "tanh"
    elif activation == "quick_gelu":
        model_hints["gelu"] = "quick"
    elif activation in ("gelu", "gelu_python"):
        model_hints["gelu"] = "erf"
    else:
        raise WeightsError(f"{path}: hidden_act is {format_value(activation)}, and this model only has GELU")
    return model_hints


def common_config(
    state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int, model_type: str, class_name: str
) -> dict[str, Any]:
    """Return what the config.json of ViT and that of DINOv2 have in common."""
    image_height, image_width = model.image_size
    config = {
        "architectures": [f"{class_name}{'ForImageClassification' if 'head.bias' in state else 'Model'}"],
        "model_type": model_type,
        "hidden_size": len(state["patch_embed.proj.weight"]),
        "num_hidden_layers": len(PLSC.blocks_in(state)),
        "num_attention_heads": num_heads,
        "num_channels": state["patch_embed.proj.weight"].shape[1],
        "patch_size": state["patch_embed.proj.weight"].shape[2],
        "image_size": image_height if image_height == image_width else [image_height, image_width],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "layer_norm_eps": model.layer_norm_epsilon,
        "hidden_act": "gelu" if model.gelu == "erf" else "gelu_pytorch_tanh",
    }
    if "head.bias" in state:
        config["id2label"] = {str(label): f"LABEL_{label}" for label in range(len(state["head.bias"]))}
    return config

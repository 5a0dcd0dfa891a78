"""Common parts of the files of image towers that were trained with texts: Hugging Face's names and config.json, and
hints from the names of timm's models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.config.model_schema import ModelConfig
from vit_static.weights.hf_config import common_config, read_hints
from vit_static.weights.name_maps import (
    IDENTITY,
    NOT_IN_TOWER,
    TRANSPOSE,
    ConfigJson,
    Conversion,
    Names,
    linears,
    norms,
)

WITHOUT_BATCH = Conversion(lambda x: x[np.newaxis], lambda x, _: x[0])  # positions [N, C]
_BLOCK = "encoder.layers.{}."
HF_NAMES: Names = (
    {
        "embeddings.patch_embedding.weight": ("patch_embed.proj.weight", IDENTITY),
        "embeddings.position_embedding.weight": ("pos_embed", WITHOUT_BATCH),
    }
    | norms(
        {
            f"{_BLOCK}layer_norm1.": "blocks.{}.norm1",
            f"{_BLOCK}layer_norm2.": "blocks.{}.norm2",
            "post_layernorm.": "norm",
        }
    )
    | linears(
        {
            **{f"{_BLOCK}self_attn.{part}_proj.": f"blocks.{{}}.attn.{part}" for part in "qkv"},
            f"{_BLOCK}self_attn.out_proj.": "blocks.{}.attn.proj",
            f"{_BLOCK}mlp.fc1.": "blocks.{}.mlp.fc1",
            f"{_BLOCK}mlp.fc2.": "blocks.{}.mlp.fc2",
        },
        TRANSPOSE,
    )
)
HF_TEXTS = {
    r"(.*\.)?text_model\..*": NOT_IN_TOWER,
    r"(.*\.)?(text_projection\.weight|logit_scale|logit_bias)": NOT_IN_TOWER,
}


def hf_tower_json(defaults: dict[str, Any]) -> ConfigJson:
    """Return the reader of a config.json of an image tower or of both; it leaves out what has its default."""

    def read(config: dict[str, Any], path: Path) -> dict[str, Any]:
        vision = config.get("vision_config", config)
        return read_hints(defaults | (vision if isinstance(vision, dict) else {}), path)

    return ConfigJson(read)


def hf_tower_config(
    state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int, model_type: str, class_name: str
) -> dict[str, Any]:
    """Return the config.json of an image tower without a text tower."""
    config = common_config(state, model, num_heads, model_type, class_name)
    names = {"erf": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}
    changed = {"architectures": [class_name], "hidden_act": names[model.gelu]}
    config |= {**changed, "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[1]}
    return {key: value for key, value in config.items() if key not in ("qkv_bias", "id2label")}


def hf_tower_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    """Return why Hugging Face has no image tower with a model's images, blocks and biases."""
    if model.image_size[0] != model.image_size[1]:
        return "Hugging Face's image towers are for square images; use --format timm"
    if "blocks.0.ls1.gamma" in state:
        return "Hugging Face's image towers have no LayerScale; fold it into the weights with --fold-layer-scale"
    if not model.qkv_bias:
        return "Hugging Face's image towers have biases of queries, keys and values; use --format timm"
    return None


# timm's SigLIP models with the tanh approximation; the others have the exact GELU.
_WITH_TANH = r"vit_(giantopt_patch16|so400m_patch16|base_patch32)_siglip_.*|vit_large_patch16_siglip_(gap_)?512.*"


def read_timm(config: dict[str, Any], _: Path) -> dict[str, Any]:
    """Return the GELU that the name of timm's model says."""
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        return {}
    has_tanh = re.fullmatch(_WITH_TANH, architecture) is not None
    return {"gelu": "quick" if "quickgelu" in architecture else "tanh" if has_tanh else "erf"}

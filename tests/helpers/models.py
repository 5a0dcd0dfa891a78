"""Small models with each token layout and pooling, with and without an attention recorder."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from helpers.small import SMALL
from vit_static.config.model_schema import ModelConfig
from vit_static.inference.attention_maps import AttentionRecorder
from vit_static.model.vit import VisionTransformer

KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average": {"pool": "gap", "representation_size": None},
    "average beside a class token": {"pool": "gap", "class_token": True},
    "both": {"pool": "cls_gap", "layer_scale_init": None},
    "registers, a class token without position": {"register_tokens": 2, "class_token_pos_embed": False},
    "a distillation token": {"distillation_token": True, "representation_size": None, "register_tokens": 1},
    "average beside registers": {"pool": "gap", "register_tokens": 3},
    "rotary positions and attention pooling": {
        **{"rope": "axial", "pos_embed": "none", "pool": "map", "qkv_bias": "qv", "register_tokens": 1},
        **{"norm": "rms", "qk_norm": True, "mlp": "swiglu", "representation_size": None},
    },
    "mixed rotary positions and more norms": {
        **{"rope": "mixed", "pre_norm": True, "attention_norm": True, "mlp_norm": True, "gelu": "quick"},
    },
    "fixed positions": {"pos_embed": "sincos2d", "qkv_bias": False, "fc_norm": True},
}


def config_of(kind: str) -> ModelConfig:
    """Return the small model's config with the changes of a kind."""
    return ModelConfig.model_validate({**SMALL.model_dump(), **KINDS[kind]})


def recording_model(config: ModelConfig, seed: int = 0) -> VisionTransformer:
    """Return a model that records its attention; its weights are so large that the attention is far from uniform."""
    paddle.seed(seed)
    model = VisionTransformer(config, AttentionRecorder())
    rng = np.random.default_rng(seed)
    for tensor in model.parameters():
        tensor.set_value(tensor.numpy() + rng.normal(0.0, 0.3, tensor.shape).astype(np.float32))
    model.eval()
    return model


def without_recorder(model: VisionTransformer, config: ModelConfig) -> VisionTransformer:
    """Return a model with the same weights that doesn't record its attention."""
    copy = VisionTransformer(config)
    copy.set_state_dict(model.state_dict())
    copy.eval()
    return copy

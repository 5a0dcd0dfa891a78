"""Every kind of token layout and pooling as a small model whose attention is recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from helpers.small import SMALL
from vit_static.config.schema import ModelConfig
from vit_static.inference.attention_maps import AttentionRecorder
from vit_static.model.vit import VisionTransformer

KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average": {"pool": "gap", "representation_size": None},
    "average beside a class token": {"pool": "gap", "class_token": True},
    "both": {"pool": "cls_gap", "layer_scale_init": None},
    "registers, a class token without position": {"register_tokens": 2, "class_token_pos_embed": False},
    "average beside registers": {"pool": "gap", "register_tokens": 3},
    "fixed positions": {"pos_embed": "sincos2d", "qkv_bias": False, "fc_norm": True},
}


def config_of(kind: str) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL.model_dump(), **KINDS[kind]})


def recording_model(config: ModelConfig, seed: int = 0) -> VisionTransformer:
    """The model that records its attention, with weights so large that it attends to some patches more than others."""
    paddle.seed(seed)
    model = VisionTransformer(config, AttentionRecorder())
    rng = np.random.default_rng(seed)
    for tensor in model.parameters():
        tensor.set_value(tensor.numpy() + rng.normal(0.0, 0.3, tensor.shape).astype(np.float32))
    model.eval()
    return model


def without_recorder(model: VisionTransformer, config: ModelConfig) -> VisionTransformer:
    """The same weights in a model that records nothing."""
    found = VisionTransformer(config)
    found.set_state_dict(model.state_dict())
    found.eval()
    return found

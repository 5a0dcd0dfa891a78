"""Names in the files of timm's VisionTransformer, and of the authors' own code of DeiT, MAE, DINO and DINOv2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_static.config.model_schema import ModelConfig
from vit_static.weights.name_maps import (
    BLOCK,
    EMBEDDINGS,
    LAYERS,
    NORMS,
    OF_TEXTS,
    PRETRAINING,
    SCALES,
    TRANSPOSE,
    NameMap,
    linears,
    norms,
)
from vit_static.weights.state import State
from vit_static.weights.tables.gated import PACKED, name_packed, packed_by_name

_NORMS_WITHIN = ("attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm")


def _refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    """Return why timm's ViT doesn't have a model."""
    if "pos_embed" not in state:
        return "timm's files have a position embedding, and this model's is fixed; use --format google"
    if model.representation_size:
        return "timm's ViT has no representation layer before its head; use --head drop"
    if model.pool == "cls_gap":
        return "timm's head reads the class token or the mean, and this model's both; use --format huggingface"
    if model.distillation_token and (model.register_tokens or not model.class_token_pos_embed):
        return (
            "timm's ViT with a distillation token has no registers, and both tokens have a position; use --format plsc"
        )
    return None


def _hints_of_beit3(state: State) -> dict[str, Any]:
    """Return BEiT-3's epsilon, of whose models alone attention has a norm before its last layer."""
    return {"layer_norm_epsilon": 1e-5} if "blocks.0.attn.norm.weight" in state else {}


TIMM = NameMap(
    "timm's .safetensors",
    "patch_embed.proj.weight",
    BLOCK,
    EMBEDDINGS
    | SCALES
    | norms({**NORMS, "fc_norm.": "norm"})
    | norms({f"blocks.{{}}.{name}.": f"blocks.{{}}.{name}" for name in _NORMS_WITHIN})
    | linears(PACKED, TRANSPOSE)
    | linears({**LAYERS, "pre_logits.fc.": "head0", "blocks.{}.mlp.w3.": "blocks.{}.mlp.fc2"}, TRANSPOSE),
    model_hints={"gelu": "erf", "layer_norm_epsilon": 1e-6},
    find_hints=_hints_of_beit3,
    ignored={r"mask_token": PRETRAINING, r"decoder_.*|decoder\..*": PRETRAINING},
    outside=OF_TEXTS,
    unpack=packed_by_name,
    pack=name_packed,
    options={
        "mlp": ("swiglu",),
        "mlp_norm": (True,),
        "attention_norm": (True,),
        "qk_norm": (True,),
        "norm": ("rms",),
        "distillation_token": (True,),
    },
    refuses=_refuses,
)

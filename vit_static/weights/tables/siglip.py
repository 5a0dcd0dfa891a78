"""Names in the files of SigLIP's and SigLIP 2's image towers (arXiv 2303.15343, 2502.14786): Hugging Face's and timm's.

big_vision's are in google.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vit_static.config.model_schema import ModelConfig
from vit_static.weights.hf_config import read_hints
from vit_static.weights.name_maps import (
    IDENTITY,
    TRANSPOSE,
    ConfigJson,
    NameMap,
    linears,
    norms,
)
from vit_static.weights.state import State
from vit_static.weights.tables.timm import TIMM
from vit_static.weights.tables.towers import (
    HF_NAMES,
    HF_TEXTS,
    hf_tower_config,
    hf_tower_json,
    hf_tower_refuses,
    read_timm,
)


def _fold_patches(state: State) -> State:
    """Reshape the linear patch embedding of SigLIP 2 NaFlex [C, p p 3] to filters. Raises ValueError if it has none."""
    name = "embeddings.patch_embedding.weight"
    weight = state.get(name, np.zeros(0))
    if weight.ndim != 2:
        return state
    side = math.isqrt(weight.shape[1] // 3)
    if 3 * side * side != weight.shape[1]:
        raise ValueError(f"{name} has the shape {list(weight.shape)}, which is no square patch of three channels")
    return state | {name: weight.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)}


def _siglip_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    if model.pool != "map":
        return "Hugging Face's SiglipVisionModel pools by attention; use --format timm"
    if "head.weight" in state:
        return "Hugging Face's SiglipVisionModel has no classifier behind its attention pooling; use --head drop"
    return _tokens_refused(state, model) or hf_tower_refuses(state, model)


def _tokens_refused(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    if model.num_prefix_tokens or model.fc_norm or "pos_embed" not in state or model.representation_size:
        return (
            "Hugging Face's SigLIP has learned positions, its last norm before the pooling, and neither a class token, "
            "registers nor a layer before its head; use --format timm"
        )
    return None


HF_SIGLIP = NameMap(
    "Hugging Face SigLIP's .safetensors",
    "embeddings.patch_embedding.weight",
    r"encoder\.layers\.([0-9]{1,4})\.",
    HF_NAMES
    | {
        "embeddings.patch_embedding.bias": ("patch_embed.proj.bias", IDENTITY),
        "head.probe": ("attn_pool.latent", IDENTITY),
        "head.attention.in_proj_weight": ("attn_pool.attn.qkv.weight", TRANSPOSE),
        "head.attention.in_proj_bias": ("attn_pool.attn.qkv.bias", IDENTITY),
    }
    | norms({"head.layernorm.": "attn_pool.norm"})
    | linears(
        {
            "head.attention.out_proj.": "attn_pool.attn.proj",
            "head.mlp.fc1.": "attn_pool.mlp.fc1",
            "head.mlp.fc2.": "attn_pool.mlp.fc2",
        },
        TRANSPOSE,
    ),
    outside=HF_TEXTS,
    ignored={r"embeddings\.position_ids": "numbers the positions"},
    model_hints={"gelu": "tanh", "layer_norm_epsilon": 1e-6},
    config_json=replace(
        hf_tower_json({"num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}),
        write=lambda state, model, heads: hf_tower_config(
            state, model, heads, "siglip_vision_model", "SiglipVisionModel"
        ),
    ),
    unpack=_fold_patches,
    prefix="vision_model.",
    options={"pool": ("map",), "gelu": ("quick",)},
    refuses=_siglip_refuses,
)


def _classifier_config(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int) -> dict[str, Any]:
    tower = hf_tower_config(state, model, num_heads, "siglip_vision_model", "SiglipForImageClassification")
    architectures = tower.pop("architectures")
    labels = {str(label): f"LABEL_{label}" for label in range(len(state["head.bias"]))}
    vision = {**tower, "vision_use_head": False}
    return {"architectures": architectures, "model_type": "siglip", "vision_config": vision, "id2label": labels}


def _classifier_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    if model.pool != "gap" or "head.weight" not in state:
        return "Hugging Face's SiglipForImageClassification has a head that reads the mean of the patches"
    return _tokens_refused(state, model) or hf_tower_refuses(state, model)


HF_SIGLIP_CLASSIFIER = replace(
    HF_SIGLIP,
    names={name: ours for name, ours in HF_SIGLIP.names.items() if not name.startswith("head.")}
    | linears({"classifier.": "head"}, TRANSPOSE),
    markers=(r"classifier\.weight",),
    ignored={
        **HF_SIGLIP.ignored,
        r"head\..*": "is not read by Hugging Face's classifier, which averages the patches",
    },
    config_json=replace(HF_SIGLIP.config_json or ConfigJson(read_hints), write=_classifier_config),
    without_prefix=("classifier.",),
    options={"gelu": ("quick",)},
    refuses=_classifier_refuses,
)

# -- timm ------------------------------------------------------------------------------------------------------------


def _refuse_pooled_prefix(state: State) -> State:
    """Raise ValueError if the file's attention pooling leaves out tokens that this model's reads."""
    if "reg_token" in state or "cls_token" in state:
        raise ValueError(
            "timm's attention pooling reads only the patches, and this model's also the class token and registers, "
            "which the file has; use a SigLIP, which has neither"
        )
    return TIMM.unpack(state)


def _timm_siglip_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    if model.num_prefix_tokens:
        return "timm's attention pooling reads only the patches, and this model's all tokens; use --format plsc"
    return TIMM.refuses(state, model)


TIMM_SIGLIP = replace(
    TIMM,
    format="timm SigLIP's .safetensors",
    names={
        **TIMM.names,
        "attn_pool.latent": ("attn_pool.latent", IDENTITY),
        **norms({"attn_pool.norm.": "attn_pool.norm"}),
        **linears(
            {
                "attn_pool.q.": "attn_pool.attn.q",
                "attn_pool.kv.": ("attn_pool.attn.k", "attn_pool.attn.v"),
                "attn_pool.proj.": "attn_pool.attn.proj",
                "attn_pool.mlp.fc1.": "attn_pool.mlp.fc1",
                "attn_pool.mlp.fc2.": "attn_pool.mlp.fc2",
            },
            TRANSPOSE,
        ),
    },
    markers=(*TIMM.markers, r"attn_pool\.latent"),
    assumptions={"gelu": "without config.json, timm's exact GELU is assumed, erf; SigLIP was trained with tanh"},
    config_json=ConfigJson(read_timm),
    unpack=_refuse_pooled_prefix,
    options={**TIMM.options, "pool": ("map",)},
    refuses=_timm_siglip_refuses,
)

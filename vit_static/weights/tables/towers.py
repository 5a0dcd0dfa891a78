"""Names in the files of image towers that were trained with texts: CLIP and SigLIP, in the layouts of OpenAI, OpenCLIP,
Hugging Face and timm. big_vision's SigLIP is in google.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
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
    NameMap,
    Names,
    linears,
    norms,
)
from vit_static.weights.state import State
from vit_static.weights.tables.timm import TIMM

_WITHOUT_BATCH = Conversion(lambda x: x[np.newaxis], lambda x, _: x[0])  # positions [N, C]
_TOKEN = Conversion(lambda x: x[np.newaxis, np.newaxis], lambda x, _: x[0, 0])  # [C]

_CLIP_HINTS: dict[str, Any] = {"layer_norm_epsilon": 1e-5, "class_token_pos_embed": True}
_UNKNOWN_GELU = "no array tells which GELU a CLIP tower has (OpenAI's, DFN's and MetaCLIP's: quick; most others: erf); "
_PROJECTION = {"num_classes": "the head is CLIP's projection, which has no bias, so head.bias is 0"}


def _add_bias(state: State, weight: str, num_outputs_axis: int) -> State:
    """Add biases of zeros for a projection [.., ..] that has none, as timm does."""
    projection = state.get(f"{weight}")
    if projection is None or projection.ndim != 2:
        return state
    return state | {_bias_of(weight): np.zeros(projection.shape[num_outputs_axis], np.float32)}


def _bias_of(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"


def _refuses_of_clip(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    """Return why neither OpenAI's CLIP nor Hugging Face's is a model."""
    if not model.pre_norm:
        return "CLIP has a norm before its blocks, and this model has none; use --format timm"
    if model.pool != "cls" or not model.class_token_pos_embed or model.fc_norm or "pos_embed" not in state:
        return "CLIP reads its class token, which has a position, after the last norm; use --format timm"
    if not model.qkv_bias:
        return "CLIP has biases of queries, keys and values, and this model has none; use --format timm"
    if model.register_tokens or model.representation_size:
        return "CLIP has neither registers nor a layer before its projection; use --format timm, or --head drop"
    if "head.bias" in state and state["head.bias"].any():
        return "CLIP's projection has no bias, and this model's head has one; use --head drop or --format timm"
    return None


# -- OpenAI and OpenCLIP ---------------------------------------------------------------------------------------------

_BLOCK = "transformer.resblocks.{}."


def _find_num_heads(state: State) -> dict[str, Any]:
    """Return the number of heads of OpenAI's towers, which have 64 channels each."""
    embedding = state.get("conv1.weight", np.zeros(0))
    width = embedding.shape[0]
    return {"num_heads": width // 64} if width and width % 64 == 0 else {}


def _read_open_clip(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return hints from the content of an open_clip_config.json."""
    model = config.get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vision, dict):
        return {}
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    is_whole = type(width) is int and type(head_width) is int and head_width > 0 and width % head_width == 0
    heads = {"num_attention_heads": width // head_width} if is_whole else {}
    return read_hints(heads | {"hidden_act": "quick_gelu" if model.get("quick_gelu") is True else "gelu"}, path)


OPEN_CLIP = NameMap(
    "OpenCLIP's .safetensors",
    "conv1.weight",
    r"transformer\.resblocks\.([0-9]{1,4})\.",
    {
        "class_embedding": ("cls_token", _TOKEN),
        "positional_embedding": ("pos_embed", _WITHOUT_BATCH),
        "conv1.weight": ("patch_embed.proj.weight", IDENTITY),
        f"{_BLOCK}attn.in_proj_weight": ("blocks.{}.attn.qkv.weight", TRANSPOSE),
        f"{_BLOCK}attn.in_proj_bias": ("blocks.{}.attn.qkv.bias", IDENTITY),
        f"{_BLOCK}ls_1.gamma": ("blocks.{}.ls1.gamma", IDENTITY),
        f"{_BLOCK}ls_2.gamma": ("blocks.{}.ls2.gamma", IDENTITY),
        "proj": ("head.weight", IDENTITY),
        "proj.bias": ("head.bias", IDENTITY),
    }
    | norms(
        {
            "ln_pre.": "norm_pre",
            f"{_BLOCK}ln_1.": "blocks.{}.norm1",
            f"{_BLOCK}ln_2.": "blocks.{}.norm2",
            "ln_post.": "norm",
        }
    )
    | linears(
        {
            f"{_BLOCK}attn.out_proj.": "blocks.{}.attn.proj",
            f"{_BLOCK}mlp.c_fc.": "blocks.{}.mlp.fc1",
            f"{_BLOCK}mlp.c_proj.": "blocks.{}.mlp.fc2",
        },
        TRANSPOSE,
    ),
    markers=(r"class_embedding", r"transformer\.resblocks\.[0-9]+\.attn\.in_proj_weight", r"ln_pre\.weight"),
    outside={
        r"(.*\.)?(text\..*|transformer\.resblocks\..*|token_embedding\.weight|positional_embedding)": NOT_IN_TOWER,
        r"(.*\.)?(ln_final\..*|text_projection(\..*)?|logit_scale|logit_bias|attn_mask)": NOT_IN_TOWER,
    },
    model_hints=_CLIP_HINTS | {"gelu": "erf"},
    assumptions={**_PROJECTION, "gelu": f"{_UNKNOWN_GELU}assumed is that of OpenCLIP's default, erf"},
    config_json=ConfigJson(_read_open_clip, file_name="open_clip_config.json"),
    unpack=lambda state: _add_bias(state, "proj", 1),
    pack=lambda state, num_heads: {name: array for name, array in state.items() if name != "proj.bias"},
    prefix="visual.",
    options={"pre_norm": (True,), "gelu": ("quick",)},
    refuses=_refuses_of_clip,
)
# Entries beside the weights that only OpenAI's own files have.
_ENTRIES = ("input_resolution", "context_length", "vocab_size")
OPENAI_CLIP = replace(
    OPEN_CLIP,
    format="OpenAI CLIP's .safetensors",
    markers=(*OPEN_CLIP.markers, *(rf"(.*\.)?{entry}" for entry in _ENTRIES)),
    outside={**OPEN_CLIP.outside, **{rf"(.*\.)?{entry}": "says how the model was built" for entry in _ENTRIES}},
    model_hints=_CLIP_HINTS | {"gelu": "quick"},
    assumptions={**_PROJECTION, "gelu": f"{_UNKNOWN_GELU}quick follows from OpenAI's entry input_resolution"},
    find_hints=_find_num_heads,
    config_json=None,
)

# -- Hugging Face ----------------------------------------------------------------------------------------------------

_HF_BLOCK = "encoder.layers.{}."
_HF_NAMES: Names = (
    {
        "embeddings.patch_embedding.weight": ("patch_embed.proj.weight", IDENTITY),
        "embeddings.position_embedding.weight": ("pos_embed", _WITHOUT_BATCH),
    }
    | norms(
        {
            f"{_HF_BLOCK}layer_norm1.": "blocks.{}.norm1",
            f"{_HF_BLOCK}layer_norm2.": "blocks.{}.norm2",
            "post_layernorm.": "norm",
        }
    )
    | linears(
        {
            **{f"{_HF_BLOCK}self_attn.{part}_proj.": f"blocks.{{}}.attn.{part}" for part in "qkv"},
            f"{_HF_BLOCK}self_attn.out_proj.": "blocks.{}.attn.proj",
            f"{_HF_BLOCK}mlp.fc1.": "blocks.{}.mlp.fc1",
            f"{_HF_BLOCK}mlp.fc2.": "blocks.{}.mlp.fc2",
        },
        TRANSPOSE,
    )
)
_OF_TEXTS = {
    r"(.*\.)?text_model\..*": NOT_IN_TOWER,
    r"(.*\.)?(text_projection\.weight|logit_scale|logit_bias)": NOT_IN_TOWER,
}


def _read_tower(defaults: dict[str, Any]) -> ConfigJson:
    """Return the reader of a config.json of an image tower or of both; it leaves out what has its default."""

    def read(config: dict[str, Any], path: Path) -> dict[str, Any]:
        vision = config.get("vision_config", config)
        return read_hints(defaults | (vision if isinstance(vision, dict) else {}), path)

    return ConfigJson(read)


def _tower_config(
    state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int, model_type: str, class_name: str
) -> dict[str, Any]:
    """Return the config.json of an image tower without a text tower."""
    config = common_config(state, model, num_heads, model_type, class_name)
    names = {"erf": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}
    changed = {"architectures": [class_name], "hidden_act": names[model.gelu]}
    config |= {**changed, "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[1]}
    return {key: value for key, value in config.items() if key not in ("qkv_bias", "id2label")}


def _clip_config(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int) -> dict[str, Any]:
    if "head.weight" not in state:
        return _tower_config(state, model, num_heads, "clip_vision_model", "CLIPVisionModel")
    config = _tower_config(state, model, num_heads, "clip_vision_model", "CLIPVisionModelWithProjection")
    return {**config, "projection_dim": state["head.weight"].shape[1]}


def _refuses_in_hf(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    """Return why Hugging Face has no image tower with a model's images, blocks and biases."""
    if model.image_size[0] != model.image_size[1]:
        return "Hugging Face's image towers are for square images; use --format timm"
    if "blocks.0.ls1.gamma" in state:
        return "Hugging Face's image towers have no LayerScale; fold it into the weights with --fold-layer-scale"
    if not model.qkv_bias:
        return "Hugging Face's image towers have biases of queries, keys and values; use --format timm"
    return None


HF_CLIP = NameMap(
    "Hugging Face CLIP's .safetensors",
    "embeddings.patch_embedding.weight",
    r"encoder\.layers\.([0-9]{1,4})\.",
    _HF_NAMES
    | {
        "embeddings.class_embedding": ("cls_token", _TOKEN),
        "visual_projection.weight": ("head.weight", TRANSPOSE),
        "visual_projection.bias": ("head.bias", IDENTITY),
    }
    | norms({"pre_layrnorm.": "norm_pre"}),
    markers=(r"embeddings\.class_embedding", r"pre_layrnorm\.weight"),
    outside=_OF_TEXTS,
    ignored={
        r"classifier\..*": "reads the mean of the patches before the last norm, which this model doesn't have",
        r"embeddings\.position_ids": "numbers the positions",
    },
    model_hints=_CLIP_HINTS | {"gelu": "quick"},
    assumptions={
        **_PROJECTION,
        "gelu": f"{_UNKNOWN_GELU}without config.json, Hugging Face's default is assumed, quick",
    },
    config_json=replace(
        _read_tower({"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}),
        write=_clip_config,
    ),
    unpack=lambda state: _add_bias(state, "visual_projection.weight", 0),
    pack=lambda state, num_heads: {name: array for name, array in state.items() if name != "visual_projection.bias"},
    prefix="vision_model.",
    without_prefix=("visual_projection.",),
    options={"pre_norm": (True,), "gelu": ("quick",)},
    refuses=lambda state, model: _refuses_of_clip(state, model) or _refuses_in_hf(state, model),
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
    return _tokens_refused(state, model) or _refuses_in_hf(state, model)


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
    _HF_NAMES
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
    outside=_OF_TEXTS,
    ignored={r"embeddings\.position_ids": "numbers the positions"},
    model_hints={"gelu": "tanh", "layer_norm_epsilon": 1e-6},
    config_json=replace(
        _read_tower({"num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}),
        write=lambda state, model, heads: _tower_config(
            state, model, heads, "siglip_vision_model", "SiglipVisionModel"
        ),
    ),
    unpack=_fold_patches,
    prefix="vision_model.",
    options={"pool": ("map",), "gelu": ("quick",)},
    refuses=_siglip_refuses,
)


def _classifier_config(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int) -> dict[str, Any]:
    tower = _tower_config(state, model, num_heads, "siglip_vision_model", "SiglipForImageClassification")
    architectures = tower.pop("architectures")
    labels = {str(label): f"LABEL_{label}" for label in range(len(state["head.bias"]))}
    vision = {**tower, "vision_use_head": False}
    return {"architectures": architectures, "model_type": "siglip", "vision_config": vision, "id2label": labels}


def _classifier_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    if model.pool != "gap" or "head.weight" not in state:
        return "Hugging Face's SiglipForImageClassification has a head that reads the mean of the patches"
    return _tokens_refused(state, model) or _refuses_in_hf(state, model)


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

# OpenCLIP wraps timm's towers: their names are below visual.trunk.
_OUTSIDE_TRUNK = {
    r"text\..*": NOT_IN_TOWER,
    r"logit_(scale|bias)": NOT_IN_TOWER,
    r"visual\.head\..*": "is OpenCLIP's projection behind timm's tower",
}


# timm's SigLIP models with the tanh approximation; the others have the exact GELU.
_WITH_TANH = r"vit_(giantopt_patch16|so400m_patch16|base_patch32)_siglip_.*|vit_large_patch16_siglip_(gap_)?512.*"


def _read_timm(config: dict[str, Any], _: Path) -> dict[str, Any]:
    """Return the GELU that the name of timm's model says."""
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        return {}
    has_tanh = re.fullmatch(_WITH_TANH, architecture) is not None
    return {"gelu": "quick" if "quickgelu" in architecture else "tanh" if has_tanh else "erf"}


def _refuse_pooled_prefix(state: State) -> State:
    """Raise ValueError if the file's attention pooling leaves out tokens that this model's reads."""
    if "reg_token" in state or "cls_token" in state:
        raise ValueError(
            "timm's attention pooling reads only the patches, and this model's also the class token and registers, "
            "which the file has; use a SigLIP, which has neither"
        )
    return state


def _timm_clip_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    return TIMM.refuses(state, model) or (None if model.pre_norm else "timm's CLIP has a norm before its blocks")


def _timm_siglip_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    if model.num_prefix_tokens:
        return "timm's attention pooling reads only the patches, and this model's all tokens; use --format plsc"
    return TIMM.refuses(state, model)


TIMM_CLIP = replace(
    TIMM,
    format="timm CLIP's .safetensors",
    names={**TIMM.names, **norms({"norm_pre.": "norm_pre"})},
    markers=(*TIMM.markers, r"norm_pre\.weight"),
    outside={**TIMM.outside, **_OUTSIDE_TRUNK},
    model_hints={"gelu": "erf", "layer_norm_epsilon": 1e-5},
    assumptions={
        "gelu": f"{_UNKNOWN_GELU}without config.json, erf is assumed, as in timm's vit_*_clip_*, whose "
        "vit_*_clip_quickgelu_* have quick"
    },
    config_json=ConfigJson(_read_timm),
    options={**TIMM.options, "pre_norm": (True,), "gelu": ("quick",)},
    refuses=_timm_clip_refuses,
)
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
    outside={**TIMM.outside, **_OUTSIDE_TRUNK},
    assumptions={"gelu": "without config.json, timm's exact GELU is assumed, erf; SigLIP was trained with tanh"},
    config_json=ConfigJson(_read_timm),
    unpack=_refuse_pooled_prefix,
    options={**TIMM.options, "pool": ("map",)},
    refuses=_timm_siglip_refuses,
)

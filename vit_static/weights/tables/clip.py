"""Names in the files of CLIP's image towers (arXiv 2103.00020): OpenAI's, OpenCLIP's, Hugging Face's and timm's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.config.model_schema import ModelConfig
from vit_static.weights.hf_config import read_hints
from vit_static.weights.name_maps import (
    IDENTITY,
    NOT_IN_TOWER,
    TRANSPOSE,
    ConfigJson,
    Conversion,
    NameMap,
    linears,
    norms,
)
from vit_static.weights.state import State
from vit_static.weights.tables.timm import TIMM
from vit_static.weights.tables.towers import (
    HF_NAMES,
    HF_TEXTS,
    WITHOUT_BATCH,
    hf_tower_config,
    hf_tower_json,
    hf_tower_refuses,
    read_timm,
)

_TOKEN = Conversion(lambda x: x[np.newaxis, np.newaxis], lambda x, _: x[0, 0])  # [C]
_CLIP_HINTS: dict[str, Any] = {"layer_norm_epsilon": 1e-5, "class_token_pos_embed": True}
_UNKNOWN_GELU = "no array tells which GELU a CLIP tower has (OpenAI's, DFN's and MetaCLIP's: quick; most others: erf); "
_PROJECTION = {"num_classes": "the head is CLIP's projection, which has no bias, so head.bias is 0"}


def _add_bias(state: State, weight: str, num_outputs_axis: int) -> State:
    """Add biases of zeros for a projection [.., ..] that has none, as timm does."""
    projection = state.get(weight)
    if projection is None or projection.ndim != 2:
        return state
    return state | {f"{weight.removesuffix('.weight')}.bias": np.zeros(projection.shape[num_outputs_axis], np.float32)}


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
        "positional_embedding": ("pos_embed", WITHOUT_BATCH),
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


def _clip_config(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int) -> dict[str, Any]:
    if "head.weight" not in state:
        return hf_tower_config(state, model, num_heads, "clip_vision_model", "CLIPVisionModel")
    config = hf_tower_config(state, model, num_heads, "clip_vision_model", "CLIPVisionModelWithProjection")
    return {**config, "projection_dim": state["head.weight"].shape[1]}


HF_CLIP = NameMap(
    "Hugging Face CLIP's .safetensors",
    "embeddings.patch_embedding.weight",
    r"encoder\.layers\.([0-9]{1,4})\.",
    HF_NAMES
    | {
        "embeddings.class_embedding": ("cls_token", _TOKEN),
        "visual_projection.weight": ("head.weight", TRANSPOSE),
        "visual_projection.bias": ("head.bias", IDENTITY),
    }
    | norms({"pre_layrnorm.": "norm_pre"}),
    markers=(r"embeddings\.class_embedding", r"pre_layrnorm\.weight"),
    outside=HF_TEXTS,
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
        hf_tower_json({"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}),
        write=_clip_config,
    ),
    unpack=lambda state: _add_bias(state, "visual_projection.weight", 0),
    pack=lambda state, num_heads: {name: array for name, array in state.items() if name != "visual_projection.bias"},
    prefix="vision_model.",
    without_prefix=("visual_projection.",),
    options={"pre_norm": (True,), "gelu": ("quick",)},
    refuses=lambda state, model: _refuses_of_clip(state, model) or hf_tower_refuses(state, model),
)

# -- timm ------------------------------------------------------------------------------------------------------------


def _timm_clip_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    return TIMM.refuses(state, model) or (None if model.pre_norm else "timm's CLIP has a norm before its blocks")


TIMM_CLIP = replace(
    TIMM,
    format="timm CLIP's .safetensors",
    names={**TIMM.names, **norms({"norm_pre.": "norm_pre"})},
    markers=(*TIMM.markers, r"norm_pre\.weight"),
    model_hints={"gelu": "erf", "layer_norm_epsilon": 1e-5},
    assumptions={
        "gelu": f"{_UNKNOWN_GELU}without config.json, erf is assumed, as in timm's vit_*_clip_*, whose "
        "vit_*_clip_quickgelu_* have quick"
    },
    config_json=ConfigJson(read_timm),
    options={**TIMM.options, "pre_norm": (True,), "gelu": ("quick",)},
    refuses=_timm_clip_refuses,
)

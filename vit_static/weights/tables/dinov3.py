"""Names in the files of DINOv3 (arXiv 2508.10104): the authors', timm's and Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common.errors import WeightsError, format_value
from vit_static.config.model_schema import ModelConfig
from vit_static.weights.hf_config import common_config, read_hints
from vit_static.weights.name_maps import (
    BLOCK,
    EMBEDDINGS,
    IDENTITY,
    LAYERS,
    NORMS,
    PRETRAINING,
    PUBLISHED,
    SCALES,
    TRANSPOSE,
    ConfigJson,
    NameMap,
    linears,
    norms,
    same,
)
from vit_static.weights.state import State
from vit_static.weights.tables.gated import name_gated
from vit_static.weights.tables.rope_constants import CONSTANTS, hints_of_periods

# What all of them compute, beside what the arrays say. The image size is that of the published models, which read any.
_HINTS: dict[str, Any] = {
    "gelu": "erf",
    "layer_norm_epsilon": 1e-5,
    "pos_embed": "none",
    "rope": "axial",
    "rope_base": 100.0,
    "rope_grid": None,
    "image_size": (224, 224),
}
_ASSUMPTIONS = {"rope_base": f"{PUBLISHED} 100, the default"}
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "rope": ("axial",),
    "pos_embed": ("none",),
    "qkv_bias": ("qv",),
    "mlp": ("swiglu",),
}


def _has_other_positions(model: ModelConfig) -> bool:
    return model.rope != "axial" or model.rope_grid is not None or model.rope_register_base is not None


def _mask_biases(state: State) -> State:
    """Apply the masks that set the biases of keys to 0: those of queries and values become arrays of their own."""
    arrays = dict(state)
    for name, mask in state.items():
        if not name.endswith(".attn.qkv.bias_mask"):
            continue
        bias_name = name.removesuffix("_mask")
        bias = arrays.pop(bias_name, None)
        if bias is None or bias.shape != mask.shape or bias.ndim != 1 or len(bias) % 3:
            raise ValueError(f"{name} has the shape {list(mask.shape)}, which fits no {bias_name}")
        query, key, value = np.split(mask, 3)
        if not (np.all(query == 1.0) and np.all(key == 0.0) and np.all(value == 1.0)):
            raise ValueError(f"{name} masks other biases than those of keys")
        prefix = bias_name.removesuffix(".qkv.bias")
        arrays[f"{prefix}.q.bias"], _, arrays[f"{prefix}.v.bias"] = np.split(bias, 3)
    return arrays


def _hints_of_periods(state: State) -> dict[str, Any]:
    periods, embedding = state.get("rope_embed.periods"), state["patch_embed.proj.weight"]
    if periods is None or not embedding.ndim:
        return {}
    return hints_of_periods(periods, len(embedding), "rope_embed.periods")


_BIASES = same("blocks.{}.attn.q.bias", "blocks.{}.attn.v.bias")
DINOV3 = NameMap(
    "DINOv3's .safetensors",
    "patch_embed.proj.weight",
    BLOCK,
    {name: entry for name, entry in EMBEDDINGS.items() if name not in ("reg_token", "pos_embed")}
    | {"storage_tokens": ("reg_token", IDENTITY)}
    | SCALES
    | _BIASES
    | norms(NORMS)
    | linears(
        {
            **LAYERS,
            "blocks.{}.mlp.w1.": "blocks.{}.mlp.gate",
            "blocks.{}.mlp.w2.": "blocks.{}.mlp.fc1",
            "blocks.{}.mlp.w3.": "blocks.{}.mlp.fc2",
        },
        TRANSPOSE,
    ),
    markers=(r"(storage_tokens|rope_embed\.periods|blocks\.[0-9]+\.attn\.qkv\.bias_mask)",),
    model_hints=_HINTS,
    assumptions=_ASSUMPTIONS,
    ignored={
        r"mask_token": PRETRAINING,
        r"local_cls_norm\..*": PRETRAINING,
        r"rope_embed\.periods": CONSTANTS,
        r"blocks\.[0-9]+\.attn\.qkv\.bias_mask": "sets the biases of keys to 0, and this model has none",
    },
    unpack=_mask_biases,
    find_hints=_hints_of_periods,
)


def _ask_for_pool(state: State) -> dict[str, str]:
    """Return that what a head reads is open: timm's models average the patches unless told otherwise."""
    if "head.weight" not in state or "fc_norm.weight" in state:
        return {}
    return {
        "pool": "no array determines whether the head reads the class token (global_pool='token') or the mean of the "
        "patches (timm's default)"
    }


def _timm_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    if _has_other_positions(model):
        return "timm's DINOv3 has rotary positions without a grid, for patches only; use --format plsc"
    if model.representation_size or model.pool == "cls_gap":
        return "timm's head is one layer that reads the class token or the mean; use --head drop"
    return None


TIMM_DINOV3 = NameMap(
    "timm's .safetensors of DINOv3",
    "patch_embed.proj.weight",
    BLOCK,
    {name: entry for name, entry in EMBEDDINGS.items() if name != "pos_embed"}
    | {f"blocks.{{}}.gamma_{branch}": (f"blocks.{{}}.ls{branch}.gamma", IDENTITY) for branch in (1, 2)}
    | {f"blocks.{{}}.attn.{part}_bias": (f"blocks.{{}}.attn.{part}.bias", IDENTITY) for part in "qv"}
    | norms({**NORMS, "fc_norm.": "norm"})
    | linears(
        {
            **LAYERS,
            "blocks.{}.mlp.fc1_g.": "blocks.{}.mlp.gate",
            "blocks.{}.mlp.fc1_x.": "blocks.{}.mlp.fc1",
        },
        TRANSPOSE,
    ),
    markers=(r"blocks\.[0-9]+\.gamma_1", "reg_token", "cls_token"),
    absent=("pos_embed", r"rope\.freqs"),
    model_hints=_HINTS,
    assumptions=_ASSUMPTIONS,
    ignored={r"mask_token": PRETRAINING, r"rope\.periods": CONSTANTS},
    find_undetermined=_ask_for_pool,
    pack=name_gated,
    options=_OPTIONS,
    refuses=_timm_refuses,
)


def _read_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return hints from the content of config.json. Raises WeightsError for impossible values."""
    activation = config.get("hidden_act", "gelu")
    if config.get("use_gated_mlp") is True:
        if activation not in ("silu", "swish"):
            raise WeightsError(
                f"{path}: hidden_act is {format_value(activation)}, and this model's gated MLP only has silu"
            )
        config = {**config, "hidden_act": "gelu"}
    hints = read_hints(config, path)
    base, size = config.get("rope_theta"), config.get("image_size")
    if isinstance(base, (int, float)) and not isinstance(base, bool):
        if not 0 < base < 1e12:
            raise WeightsError(f"{path}: rope_theta is {format_value(base)}, which no model has")
        hints["rope_base"] = float(base)
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) == 2 and all(type(side) is int and 0 < side <= 100_000 for side in sides):
        hints["image_size"] = tuple(sides)
    return hints


def _write_config(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int) -> dict[str, Any]:
    config = common_config(state, model, num_heads, "dinov3_vit", "DINOv3ViT")
    del config["qkv_bias"]
    has_gate = model.mlp == "swiglu"
    return {
        **config,
        "hidden_act": "silu" if has_gate else config["hidden_act"],
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[1],
        "num_register_tokens": model.register_tokens,
        "query_bias": bool(model.qkv_bias),
        "key_bias": model.qkv_bias is True,
        "value_bias": bool(model.qkv_bias),
        "rope_theta": 100.0 if model.rope_base is None else model.rope_base,
        "use_gated_mlp": has_gate,
    }


_LAYER = "layer.{}."


def _remove_model_prefix(state: State) -> State:
    """Give the layers the names that files have: in memory, transformers 5 has them in `model`."""
    return {
        name.removeprefix("model.") if name.startswith("model.layer.") else name: array
        for name, array in state.items()
        if array.size  # without registers, their array is empty
    }


def _add_tokens(arrays: State, num_heads: int) -> State:
    """Add the mask token, and an empty array of registers, that from_pretrained expects."""
    token = arrays["embeddings.cls_token"]
    return {
        "embeddings.mask_token": np.zeros_like(token),
        "embeddings.register_tokens": token[:, :0],
    } | arrays


def _hf_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    if _has_other_positions(model):
        return "Hugging Face's DINOv3 has rotary positions without a grid, for patches only; use --format plsc"
    if "head.weight" in state:
        return "Hugging Face's DINOv3 has no head; use --head drop, or --format timm"
    if model.fc_norm or not model.has_class_token or "blocks.0.ls1.gamma" not in state:
        return "Hugging Face's DINOv3 has a class token, LayerScale and a norm of all tokens; use --format timm"
    return None


HF_DINOV3 = NameMap(
    "Hugging Face DINOv3's .safetensors",
    "embeddings.patch_embeddings.weight",
    r"layer\.([0-9]{1,4})\.",
    {
        "embeddings.cls_token": ("cls_token", IDENTITY),
        "embeddings.register_tokens": ("reg_token", IDENTITY),
        "embeddings.patch_embeddings.weight": ("patch_embed.proj.weight", IDENTITY),
        "embeddings.patch_embeddings.bias": ("patch_embed.proj.bias", IDENTITY),
    }
    | {f"{_LAYER}layer_scale{branch}.lambda1": (f"blocks.{{}}.ls{branch}.gamma", IDENTITY) for branch in (1, 2)}
    | norms({f"{_LAYER}norm1.": "blocks.{}.norm1", f"{_LAYER}norm2.": "blocks.{}.norm2", "norm.": "norm"})
    | linears(
        {
            **{f"{_LAYER}attention.{part}_proj.": f"blocks.{{}}.attn.{part}" for part in "qkv"},
            f"{_LAYER}attention.o_proj.": "blocks.{}.attn.proj",
            f"{_LAYER}mlp.up_proj.": "blocks.{}.mlp.fc1",
            f"{_LAYER}mlp.gate_proj.": "blocks.{}.mlp.gate",
            f"{_LAYER}mlp.down_proj.": "blocks.{}.mlp.fc2",
        },
        TRANSPOSE,
    ),
    markers=(r"(model\.)?layer\.[0-9]+\.attention\.o_proj\.weight",),
    model_hints=_HINTS,
    assumptions=_ASSUMPTIONS,
    ignored={r"embeddings\.mask_token": PRETRAINING, r"rope_embeddings\.inv_freq": CONSTANTS},
    config_json=ConfigJson(_read_config, _write_config),
    unpack=_remove_model_prefix,
    pack=_add_tokens,
    options=_OPTIONS,
    refuses=_hf_refuses,
)

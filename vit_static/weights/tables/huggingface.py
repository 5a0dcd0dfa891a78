"""Names in the files of Hugging Face's ViT and DINOv2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vit_static.config.model_schema import ModelConfig
from vit_static.weights.hf_config import common_config, read_hints
from vit_static.weights.name_maps import IDENTITY, PRETRAINING, TRANSPOSE, ConfigJson, NameMap, Names, linears, norms
from vit_static.weights.state import State

_EMBEDDING = "embeddings.patch_embeddings.projection.weight"
_BLOCK = "encoder.layer.{}."
_NUMBER = r"encoder\.layer\.([0-9]{1,4})\."
_QKV = {f"{_BLOCK}attention.attention.{name}.": f"blocks.{{}}.attn.{name[0]}" for name in ("query", "key", "value")}
_EMBEDDINGS: Names = {
    "embeddings.cls_token": ("cls_token", IDENTITY),
    "embeddings.register_tokens": ("reg_token", IDENTITY),
    "embeddings.position_embeddings": ("pos_embed", IDENTITY),
    "embeddings.patch_embeddings.projection.weight": ("patch_embed.proj.weight", IDENTITY),
    "embeddings.patch_embeddings.projection.bias": ("patch_embed.proj.bias", IDENTITY),
}


def _refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    """Return why neither ViT nor DINOv2 is a model."""
    if "pos_embed" not in state:
        return "huggingface's files have a position embedding, and this model's is fixed; use --format google"
    if model.fc_norm:
        return "this model's last norm comes after the pooling, which huggingface doesn't have; use --format timm"
    has_scale = "blocks.0.ls1.gamma" in state
    has_head = "head.weight" in state  # without one, what it would read makes no difference
    if (has_head and model.pool == "gap") or not model.has_class_token or not model.class_token_pos_embed:
        return "Hugging Face's head reads the class token, which has a position; use --format timm"
    if (
        (has_head and (model.pool == "cls_gap") != has_scale)
        or model.representation_size
        or (model.register_tokens and not has_scale)
    ):
        return (
            "Hugging Face has ViT (class token, no LayerScale) and DINOv2 (both poolings, LayerScale), and this model "
            "is neither; use --format timm, or --fold-layer-scale"
        )
    return None


def _vit_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    return _refuses(state, model) or ("ViT has no LayerScale" if "blocks.0.ls1.gamma" in state else None)


def _deit_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    reason = _vit_refuses(state, model)
    return reason or (None if model.distillation_token else "the model has no distillation token")


def _registers_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    return _refuses(state, model) or (None if model.register_tokens else "the model has no registers")


def _vit_config(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int) -> dict[str, Any]:
    config = common_config(state, model, num_heads, "vit", "ViT")
    return {**config, "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[1]}


def _deit_config(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int) -> dict[str, Any]:
    config = common_config(state, model, num_heads, "deit", "DeiT")
    if "head.bias" in state:
        config["architectures"] = ["DeiTForImageClassificationWithTeacher"]
    return {**config, "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[1]}


def _mlp_ratio(width: int, mlp_dim: int, model: ModelConfig) -> float:
    """Return DINOv2's ratio of the MLP, which transformers 5 wants to be an int where it can be one.

    With a gate the hidden layer has two thirds of it, rounded up to a multiple of 8.
    """
    if model.mlp == "swiglu":
        ratios = (ratio for ratio in range(1, 17) if (width * ratio * 2 // 3 + 7) // 8 * 8 == mlp_dim)
        return next(ratios, 1.5 * mlp_dim / width)
    ratio = mlp_dim / width
    return int(ratio) if ratio.is_integer() else ratio


def _dinov2_config(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int) -> dict[str, Any]:
    width, mlp_dim = state["blocks.0.mlp.fc1.weight"].shape
    keys = {"mlp_ratio": _mlp_ratio(width, mlp_dim, model), "use_swiglu_ffn": model.mlp == "swiglu"}
    if "reg_token" not in state:
        return {**common_config(state, model, num_heads, "dinov2", "Dinov2"), **keys, "use_mask_token": False}
    common = common_config(state, model, num_heads, "dinov2_with_registers", "Dinov2WithRegisters")
    return {**common, **keys, "num_register_tokens": state["reg_token"].shape[1]}


def _name_gated(arrays: State, num_heads: int) -> State:
    """Give a gated MLP's layers their names: its first one holds the gate."""
    if not any(".mlp.weights_in." in name for name in arrays):
        return arrays
    return {name.replace(".mlp.fc2.", ".mlp.weights_out."): array for name, array in arrays.items()}


def _add_mask_token(arrays: State, num_heads: int) -> State:
    """Add the mask token that from_pretrained expects."""
    return _name_gated(arrays, num_heads) | {"embeddings.mask_token": np.zeros_like(arrays["embeddings.cls_token"][0])}


HF_VIT = NameMap(
    "Hugging Face ViT's .safetensors",
    _EMBEDDING,
    _NUMBER,
    _EMBEDDINGS
    | norms(
        {
            f"{_BLOCK}layernorm_before.": "blocks.{}.norm1",
            f"{_BLOCK}layernorm_after.": "blocks.{}.norm2",
            "layernorm.": "norm",
        }
    )
    | linears(
        {
            **_QKV,
            f"{_BLOCK}attention.output.dense.": "blocks.{}.attn.proj",
            f"{_BLOCK}intermediate.dense.": "blocks.{}.mlp.fc1",
            f"{_BLOCK}output.dense.": "blocks.{}.mlp.fc2",
            "classifier.": "head",
        },
        TRANSPOSE,
    ),
    model_hints={"gelu": "erf", "layer_norm_epsilon": 1e-12, "class_token_pos_embed": True},
    ignored={
        r"embeddings\.mask_token": PRETRAINING,
        r"decoder\..*": PRETRAINING,
        r"pooler\.dense\..*": "is not read by Hugging Face's classifier",
    },
    config_json=ConfigJson(read_hints, _vit_config),
    prefix="vit.",
    without_prefix=("classifier.",),
    refuses=_vit_refuses,
)
# DeiT with a distillation token (DeiTForImageClassificationWithTeacher); one without is a ViT.
HF_DEIT = replace(
    HF_VIT,
    format="Hugging Face DeiT's .safetensors",
    names={
        **{theirs: ours for theirs, ours in HF_VIT.names.items() if not theirs.startswith("classifier.")},
        "embeddings.distillation_token": ("dist_token", IDENTITY),
        **linears({"cls_classifier.": "head", "distillation_classifier.": "head_dist"}, TRANSPOSE),
    },
    markers=(r"embeddings\.distillation_token",),
    config_json=ConfigJson(read_hints, _deit_config),
    prefix="deit.",
    without_prefix=("cls_classifier.", "distillation_classifier."),
    options={"distillation_token": (True,)},
    refuses=_deit_refuses,
)
HF_DINOV2 = NameMap(
    "Hugging Face DINOv2's .safetensors",
    _EMBEDDING,
    _NUMBER,
    _EMBEDDINGS
    | {f"{_BLOCK}layer_scale{branch}.lambda1": (f"blocks.{{}}.ls{branch}.gamma", IDENTITY) for branch in (1, 2)}
    | norms({f"{_BLOCK}norm1.": "blocks.{}.norm1", f"{_BLOCK}norm2.": "blocks.{}.norm2", "layernorm.": "norm"})
    | linears({f"{_BLOCK}mlp.weights_in.": ("blocks.{}.mlp.gate", "blocks.{}.mlp.fc1")}, TRANSPOSE)
    | linears(
        {
            **_QKV,
            f"{_BLOCK}attention.output.dense.": "blocks.{}.attn.proj",
            f"{_BLOCK}mlp.fc1.": "blocks.{}.mlp.fc1",
            f"{_BLOCK}mlp.fc2.": "blocks.{}.mlp.fc2",
            f"{_BLOCK}mlp.weights_out.": "blocks.{}.mlp.fc2",
            "classifier.": "head",
        },
        TRANSPOSE,
    ),
    markers=(r"encoder\.layer\.[0-9]+\.layer_scale1\.lambda1",),
    model_hints={"gelu": "erf", "layer_norm_epsilon": 1e-6, "class_token_pos_embed": True},
    ignored={r"embeddings\.mask_token": PRETRAINING},
    config_json=ConfigJson(read_hints, _dinov2_config),
    pack=_name_gated,
    prefix="dinov2.",
    without_prefix=("classifier.",),
    options={"mlp": ("swiglu",)},
    refuses=_refuses,
)
HF_DINOV2_REGISTERS = replace(
    HF_DINOV2,
    markers=(*HF_DINOV2.markers, r"embeddings\.register_tokens"),
    pack=_add_mask_token,
    prefix="dinov2_with_registers.",
    refuses=_registers_refuses,
)

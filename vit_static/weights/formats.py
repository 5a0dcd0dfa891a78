"""Formats of weight files, this program's and others', detected by content and never by name.

Every format is a table of names and conversions (name_maps.py, tables/) to the files' layout (state.py); the same table
reads and writes (write.py). What a file says about its model besides the shapes of its arrays, and what its program
always does, is in `ExternalWeights.model_hints` by the keys of the config's `model` section.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vit_static.common.errors import WeightsError
from vit_static.config.model_schema import ModelConfig
from vit_static.weights.architectures import is_residual_post_norm, unsupported_reason
from vit_static.weights.name_maps import NameMap
from vit_static.weights.readers import read_arrays
from vit_static.weights.rope_order import RopeOrder
from vit_static.weights.state import State, fuse_qkv
from vit_static.weights.tables.clip import HF_CLIP, OPEN_CLIP, OPENAI_CLIP, TIMM_CLIP
from vit_static.weights.tables.dinov3 import DINOV3, HF_DINOV3, TIMM_DINOV3
from vit_static.weights.tables.eva import EVA02, EVA_FUSED, ROPE_AXIAL, ROPE_AXIAL_APE, ROPE_GAP, ROPE_MIXED, VIT5
from vit_static.weights.tables.google import BIG_VISION, VIT_JAX, VIT_JAX_BY_CLASS
from vit_static.weights.tables.huggingface import HF_DEIT, HF_DINOV2, HF_VIT
from vit_static.weights.tables.plsc import PLSC
from vit_static.weights.tables.siglip import HF_SIGLIP, HF_SIGLIP_CLASSIFIER, TIMM_SIGLIP
from vit_static.weights.tables.timm import TIMM

FormatName = Literal["plsc", "timm", "huggingface", "google", "openclip"]

# The first whose patch embedding and markers a file has is its format, so special ones stand above general ones.
_TABLES = (
    *(VIT_JAX_BY_CLASS, BIG_VISION, VIT_JAX),
    *(HF_DINOV3, HF_DINOV2, HF_DEIT, HF_VIT, HF_CLIP, HF_SIGLIP_CLASSIFIER, HF_SIGLIP),
    *(OPENAI_CLIP, OPEN_CLIP),
    *(DINOV3, TIMM_DINOV3, EVA02, EVA_FUSED, ROPE_GAP, ROPE_MIXED, ROPE_AXIAL, ROPE_AXIAL_APE, VIT5),
    *(TIMM_CLIP, TIMM_SIGLIP, TIMM),
)


@dataclass(frozen=True)
class ExternalWeights:
    """Content of a weight file, in our names and layout."""

    state: State
    format: str  # for people
    model_hints: dict[str, Any] = field(default_factory=dict)  # keys of the `model` section
    dropped: dict[str, str] = field(default_factory=dict)  # array that the model doesn't need -> reason
    undetermined: dict[str, str] = field(default_factory=dict)  # key of the `model` section to choose -> why
    rope_order: RopeOrder = "halves"  # of the channels of queries and keys; load.py permutes them for the model's heads
    assumptions: dict[str, str] = field(default_factory=dict)  # key of the `model` section -> why it is a guess
    model: ModelConfig | None = None  # the whole model, if this program recorded it (model_record.py)


def read_weights(path: Path, *, ema: bool = False) -> ExternalWeights:
    """Read a weight file: Paddle's `.pdparams`, Google's `.npz`, or `.safetensors` of timm or Hugging Face.

    `ema` selects the moving average in a file that holds one beside the weights. Raises WeightsError if the file is
    none of these, is damaged, or is of a model that this program doesn't have. Never runs code from the file.
    """
    content = read_arrays(path, ema=ema)
    state = {name: array for name, array in content.arrays.items() if array is not None}
    if not state:
        raise WeightsError(f"{path}: holds no arrays of weights")
    table = PLSC if content.container == "paddle" else _detect(content.arrays, path)
    if table is TIMM and content.model is None:
        _refuse_post_norm(state, path)
    external = _from_table(state, table, path)
    if content.container == "paddle":
        _refuse_paddleclas_small(external.state, path)
    dropped = dict.fromkeys(content.outside, "is not part of the state dict") | external.dropped
    others = {name: "is no array of floating-point numbers" for name, array in content.arrays.items() if array is None}
    if content.model is not None:
        known = {key: why for key, why in external.assumptions.items() if key == "num_classes"}
        external = replace(external, undetermined={}, assumptions=known)
    return replace(external, dropped=dropped | others, model=content.model)


def _refuse_post_norm(state: State, path: Path) -> None:
    """Raise WeightsError for a residual post-norm model of timm, by its config.json if there is one."""
    architecture = _read_json(path.with_name("config.json")).get("architecture")
    if is_residual_post_norm(state, architecture if isinstance(architecture, str) else None):
        raise WeightsError(
            f"{path}: has the arrays of timm's vit_*_rpn_* models, whose norms come after attention and MLP; this "
            "program has only norms before them. If it is another model, name it in a config.json beside the file: "
            '{"architecture": "vit_base_patch16_224"}'
        )


def _refuse_paddleclas_small(state: State, path: Path) -> None:
    fc1 = state.get("blocks.0.mlp.fc1.weight")
    has_bias = "blocks.0.attn.qkv.bias" in state
    if fc1 is not None and fc1.shape == (768, 2304) and not has_bias and len(PLSC.blocks_in(state)) == 8:
        raise WeightsError(
            f"{path}: is PaddleClas's ViT_small, which divides attention scores by the root of its width where this "
            "model divides by that of a head's channels; use another of its models"
        )


def detect_table(names: Collection[str]) -> NameMap | None:
    """Return the table of the program that has an array of each of these names; None if none is known."""
    for table in _TABLES:
        prefix = _find_prefix(names, table)
        if prefix is not None and table.has_markers(name.removeprefix(prefix) for name in names):
            return table
    return None


def _detect(names: Collection[str], path: Path) -> NameMap:
    """Return the table of the program that wrote a file. Raises WeightsError if it is none that is known."""
    table = detect_table(names)
    if table is not None:
        return table
    reason = unsupported_reason(names)
    if reason is not None:
        raise _other_architecture(path, reason)
    shown = ", ".join(sorted(names)[:3]) or "none"
    raise WeightsError(
        f"{path}: has the weights of no known Vision Transformer (its first arrays: {shown}); use a file of PLSC, "
        "timm, Hugging Face, vit_jax or big_vision"
    )


def _other_architecture(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"{path}: {reason}; use weights of a plain ViT, DeiT, MAE, DINO or DINOv2")


def _find_prefix(names: Collection[str], table: NameMap) -> str | None:
    """Return what is before a table's names in a file; None if the file has no such patch embedding."""
    endings = [name for name in names if name.endswith(table.embedding)]
    return min(endings, key=len).removesuffix(table.embedding) if endings else None


def _from_table(state: State, table: NameMap, path: Path) -> ExternalWeights:
    """Convert a file's arrays by their table."""
    prefix = _find_prefix(state, table) or ""
    without_prefix = [name for name in state if not name.startswith(prefix)]
    outside = {name: reason for name in without_prefix if (reason := _matching(table.outside, name))}
    arrays = {name.removeprefix(prefix): array for name, array in state.items() if name not in outside}
    if len(arrays) + len(outside) < len(state):
        raise WeightsError(f"{path}: has an array of the same name with and without {prefix!r}; remove one of them")
    try:
        unpacked = table.unpack(arrays)
        external = _translate(unpacked, table, path)
        described = table.find_hints(arrays | unpacked) | _read_config_json(table, path)
        hints = external.model_hints | described
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None
    assumptions = {key: why for key, why in table.assumptions.items() if key not in described}
    return replace(
        external,
        model_hints=hints,
        dropped=external.dropped | outside,
        undetermined=table.find_undetermined(unpacked),
        assumptions=assumptions,
        rope_order=table.rope_order,
    )


def _read_config_json(table: NameMap, path: Path) -> dict[str, Any]:
    """Return hints from the program's description next to the weights; none if it isn't there or isn't JSON."""
    if table.config_json is None:
        return {}
    config_path = path.with_name(table.config_json.file_name)
    config = _read_json(config_path)
    return table.config_json.read(config, config_path) if config else {}


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it isn't there or has no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _translate(state: State, table: NameMap, path: Path) -> ExternalWeights:
    """Convert arrays by the names of a table.

    Raises WeightsError for an array that the table neither has nor ignores, and for one of an impossible shape.
    """
    names = table.for_blocks(table.blocks_in(state))
    dropped = {name: reason for name in state if (reason := _matching(table.ignored, name))}
    _refuse_unexpected([name for name in state if name not in names and name not in dropped], table, path)
    arrays: State = {}
    for name, array in state.items():
        if name in dropped:
            continue
        ours, conversion = names[name]
        try:
            converted = conversion.to_ours(array) if array.ndim else array
            parts = converted if isinstance(converted, list) else [converted]
            converted_arrays = dict(zip(ours, parts, strict=True))
        except (ValueError, IndexError):
            raise _wrong_shape(path, name, array, ours[0]) from None
        for our_name, part in converted_arrays.items():
            if our_name in arrays:
                raise WeightsError(f"{path}: has several arrays for {our_name}, {name} among them; remove all but one")
            if ".attn.qkv." in our_name and (part.ndim == 0 or part.shape[-1] % 3):
                raise _wrong_shape(path, name, array, "query, key and value")
            if part.ndim not in _num_axes(our_name) or not part.size:
                raise _wrong_shape(path, name, array, our_name)
            arrays[our_name] = np.ascontiguousarray(part) if part.ndim else part
    try:
        fused = fuse_qkv(arrays)
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: its queries, keys and values don't belong together ({error})") from None
    hints = dict(table.model_hints) | _pooling_hints(arrays, has_fc_norm="fc_norm.weight" in state)
    return ExternalWeights(fused, table.format, hints, dropped)


def _refuse_unexpected(unexpected: list[str], table: NameMap, path: Path) -> None:
    """Raise WeightsError if a file has arrays that its format doesn't have."""
    if not unexpected:
        return
    reason = unsupported_reason(unexpected)
    if reason is not None:
        raise _other_architecture(path, reason)
    more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
    raise WeightsError(
        f"{path}: looks like {table.format}, but has {unexpected[0]}{more}, which those files don't have"
    )


def _matching(reasons: Mapping[str, str], name: str) -> str | None:
    """Return the reason of the first pattern that matches a name."""
    return next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, name)), None)


def _wrong_shape(path: Path, name: str, array: np.ndarray, expected: str) -> WeightsError:
    return WeightsError(f"{path}: {name} has the shape {list(array.shape)}, which doesn't fit {expected}")


def _num_axes(name: str) -> tuple[int, ...]:
    """Return how many axes an array may have, by our name for it."""
    if name in ("pos_embed", "cls_token", "dist_token", "reg_token", "attn_pool.latent"):
        return (3,)
    if name == "patch_embed.proj.weight":
        return (4,)
    if name.endswith(".gamma"):
        return (0, 1, 2)  # load.py checks LayerScale when it is folded or set
    is_vector = name.endswith(".bias") or "norm" in name
    return (1,) if is_vector else (2,)


def _pooling_hints(state: State, has_fc_norm: bool) -> dict[str, Any]:
    """Return what the head reads, as far as the arrays determine it.

    A timm model with a class token that averages the patches and has no fc_norm can't be told from one whose head reads
    the class token.
    """
    if has_fc_norm:
        return {"pool": "gap", "fc_norm": True}
    if "attn_pool.latent" in state:
        return {"pool": "map"}
    embedding, head = state.get("patch_embed.proj.weight"), state.get("head0.weight", state.get("head.weight"))
    if embedding is not None and head is not None and head.shape[:1] == (2 * embedding.shape[0],):
        return {"pool": "cls_gap"}
    return {"pool": "cls" if "cls_token" in state else "gap"}

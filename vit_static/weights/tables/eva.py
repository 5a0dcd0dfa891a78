"""Names in the files of timm's Eva class, beside DINOv3's, and of the authors' own code of EVA-02, RoPE-ViT and ViT-5.

timm's class has EVA (arXiv 2211.07636), EVA-02 (2303.11331), RoPE-ViT (2403.13298) and timm's own models with rotary
positions; ViT-5 is arXiv 2602.08071.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vit_static.config.model_schema import ModelConfig
from vit_static.weights.name_maps import (
    BLOCK,
    EMBEDDINGS,
    IDENTITY,
    IMAGE_GRID,
    LAYERS,
    NORMS,
    OF_TEXTS,
    PRETRAINING,
    PUBLISHED,
    TRANSPOSE,
    NameMap,
    Names,
    linears,
    norms,
    same,
)
from vit_static.weights.state import State
from vit_static.weights.tables.gated import PACKED, name_gated, name_packed, packed_by_name
from vit_static.weights.tables.rope_constants import (
    CONSTANTS,
    frequencies_by_block,
    hints_of_periods,
    hints_of_tables,
    stack_frequencies,
)

_GAMMAS: Names = {f"blocks.{{}}.gamma_{branch}": (f"blocks.{{}}.ls{branch}.gamma", IDENTITY) for branch in (1, 2)}
_BIASES: Names = {f"blocks.{{}}.attn.{part}_bias": (f"blocks.{{}}.attn.{part}.bias", IDENTITY) for part in "qv"}
_NORMS = {
    **NORMS,
    "fc_norm.": "norm",
    "blocks.{}.attn.norm.": "blocks.{}.attn.norm",
    "blocks.{}.mlp.norm.": "blocks.{}.mlp.norm",
    **{f"blocks.{{}}.attn.{part}_norm.": f"blocks.{{}}.attn.{part}_norm" for part in "qk"},
}
_HAS_GAMMA = r"blocks\.[0-9]+\.gamma_1"
_RELATIVE = r".*relative_position_bias_table"  # BEiT's


def _unpack(state: State) -> State:
    """Separate packed layers; leave out biases of keys that are 0. Raises ValueError for those that aren't."""
    embedding = state.get("patch_embed.proj.weight")
    if embedding is not None and embedding.shape[:1] == (1792,) and "blocks.63.norm1.weight" in state:
        raise ValueError("is EVA-02 E/14, whose norms come after attention and MLP, and this model's come before")
    for name, array in state.items():
        if name.endswith(".attn.k_bias") and array.any():
            raise ValueError(f"{name} isn't 0, and EVA's keys have no bias")
    return packed_by_name(state)


_EVA_HINTS: dict[str, Any] = {"gelu": "erf", "layer_norm_epsilon": 1e-6}
_EVA02_HINTS: dict[str, Any] = {**_EVA_HINTS, "rope": "axial", "rope_base": 10000.0, "rope_grid": (16, 16)}
_EVA02_ASSUMPTIONS = {"rope_base": f"{PUBLISHED} 10000", "rope_grid": f"{PUBLISHED} [16,16]"}
_IGNORED = {
    r"mask_token": PRETRAINING,
    r"lm_head\..*": PRETRAINING,
    r"(.*\.)?rope\.freqs_(cos|sin)": CONSTANTS,
    r"blocks\.[0-9]+\.attn\.k_bias": "is 0",
}
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "rope": ("axial",),
    "pos_embed": ("none",),
    "qkv_bias": ("qv",),
    "mlp": ("swiglu",),
    "mlp_norm": (True,),
    "attention_norm": (True,),
    "qk_norm": (True,),
    "norm": ("rms",),
}


def _hints_of_tables(state: State) -> dict[str, Any]:
    """Return what the tables of rotary positions say, of which each block may have one. ValueError if they differ."""
    hints: dict[str, Any] = {}
    embedding = state["patch_embed.proj.weight"]
    for name in [name for name in state if name.endswith("rope.freqs_cos")]:
        sin = state.get(name.replace("freqs_cos", "freqs_sin"))
        if sin is None or not embedding.ndim:
            continue
        of_table = hints_of_tables(state[name], sin, len(embedding), name)
        if hints and of_table != hints:
            raise ValueError(f"{name} holds other rotary positions than the file's other tables")
        hints = of_table
    return hints


def _refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    """Return why timm's Eva class doesn't have a model."""
    if model.rope_register_base is not None:
        return "timm's registers have no rotary positions; use --format plsc"
    if model.pos_embed == "sincos2d":
        return "timm's files have a position embedding, and this model's is fixed; use --format plsc"
    if model.representation_size or model.pool == "cls_gap":
        return "timm's head is one layer that reads the class token or the mean; use --head drop"
    if model.rope == "axial" and model.rope_grid is None:
        return "timm has rotary positions without a grid in DINOv3 only; use --format plsc"
    return None


def _eva02_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    reason = _refuses(state, model)
    if reason is None and (model.qkv_bias is True or not (model.mlp_norm or model.attention_norm)):
        reason = "EVA-02 has norms within its blocks and no biases of keys; use --format plsc"
    return reason


EVA02 = NameMap(
    "EVA-02's .safetensors",
    "patch_embed.proj.weight",
    BLOCK,
    EMBEDDINGS
    | norms(
        {
            **_NORMS,
            "blocks.{}.mlp.ffn_ln.": "blocks.{}.mlp.norm",
            "blocks.{}.attn.inner_attn_ln.": "blocks.{}.attn.norm",
        }
    )
    | linears(
        {
            **{f"blocks.{{}}.attn.{part}_proj.": f"blocks.{{}}.attn.{part}" for part in "qkv"},
            **{theirs: ours for theirs, ours in LAYERS.items() if ".qkv." not in theirs},
            "blocks.{}.mlp.fc1_g.": "blocks.{}.mlp.gate",
            "blocks.{}.mlp.fc1_x.": "blocks.{}.mlp.fc1",
            # the authors' names
            "blocks.{}.mlp.w1.": "blocks.{}.mlp.gate",
            "blocks.{}.mlp.w2.": "blocks.{}.mlp.fc1",
            "blocks.{}.mlp.w3.": "blocks.{}.mlp.fc2",
        },
        TRANSPOSE,
    )
    | _BIASES,
    markers=(r"blocks\.[0-9]+\.attn\.q_proj\.weight",),
    absent=(_HAS_GAMMA, _RELATIVE),
    model_hints=_EVA02_HINTS,
    assumptions=_EVA02_ASSUMPTIONS,
    find_hints=_hints_of_tables,
    rope_order="interleaved",
    ignored=_IGNORED,
    outside=OF_TEXTS,
    unpack=_unpack,
    pack=name_gated,
    options=_OPTIONS,
    refuses=_eva02_refuses,
)


def _fused_hints(state: State) -> dict[str, Any]:
    """Return EVA-02's hints if the MLP is gated, since EVA has neither that nor rotary positions."""
    hints = _hints_of_tables(state)
    is_gated = any(".mlp.w12." in name for name in state)
    return {"rope": "axial", **hints} if hints or is_gated else {"rope": "none"}


def _fused_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    reason = _refuses(state, model)
    return reason or ("EVA's keys have no biases; use --format plsc" if model.qkv_bias is True else None)


EVA_FUSED = NameMap(
    "EVA's .safetensors",
    "patch_embed.proj.weight",
    BLOCK,
    EMBEDDINGS
    | _GAMMAS
    | _BIASES
    | norms(_NORMS)
    | linears(PACKED, TRANSPOSE)
    | linears({**LAYERS, "blocks.{}.mlp.w3.": "blocks.{}.mlp.fc2"}, TRANSPOSE),
    markers=(r"blocks\.[0-9]+\.attn\.q_bias", "pos_embed"),
    absent=(_HAS_GAMMA, "reg_token", _RELATIVE),
    model_hints=_EVA02_HINTS,
    assumptions=_EVA02_ASSUMPTIONS,
    find_hints=_fused_hints,
    rope_order="interleaved",
    ignored=_IGNORED,
    outside=OF_TEXTS,
    unpack=_unpack,
    pack=name_packed,
    options=_OPTIONS,
    refuses=_fused_refuses,
)
# timm's vit_*_rope_reg*_gap_256
ROPE_GAP = replace(
    EVA_FUSED,
    format="timm's .safetensors of a ViT with rotary positions",
    markers=(_HAS_GAMMA, "reg_token"),
    absent=("cls_token", "pos_embed", r"blocks\.[0-9]+\.attn\.qkv\.bias"),
    model_hints={**_EVA02_HINTS, "pos_embed": "none", "image_size": (256, 256)},
    assumptions=_EVA02_ASSUMPTIONS,
    find_hints=lambda state: {},
)


def _size_without_positions(state: State) -> dict[str, Any]:
    """Return the published models' image size if no position embedding determines it."""
    return {} if "pos_embed" in state else {"pos_embed": "none", "image_size": (224, 224)}


def _rope_unpack(state: State) -> State:
    return packed_by_name(frequencies_by_block(state))


def _rope_pack(arrays: State, num_heads: int) -> State:
    return name_packed(stack_frequencies(arrays, num_heads), num_heads)


def _mixed_hints(state: State) -> dict[str, Any]:
    hints = _size_without_positions(state)
    if "rope.freqs" in state and state["rope.freqs"].ndim == 4:
        hints["num_heads"] = state["rope.freqs"].shape[2]
    return hints


def _rope_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    reason = _refuses(state, model)
    if reason is None and model.rope == "none":
        reason = "timm's ViT with rotary positions has them; use --format plsc"
    return reason or ("its keys have biases; use --format plsc" if model.qkv_bias is not True else None)


# RoPE-ViT, by its authors and in timm (vit_*_rope_*_224): of the column first, and only patches have positions.
_ROPE_HINTS: dict[str, Any] = {**_EVA_HINTS, "class_token_pos_embed": False}
ROPE_MIXED = NameMap(
    "RoPE-ViT's .safetensors",
    "patch_embed.proj.weight",
    BLOCK,
    EMBEDDINGS
    | _GAMMAS
    | same("blocks.{}.attn.rope.frequencies")
    | norms(_NORMS)
    | linears(PACKED, TRANSPOSE)
    | linears(LAYERS, TRANSPOSE),
    markers=(r"(rope\.)?freqs",),
    model_hints={**_ROPE_HINTS, "rope": "mixed", "rope_base": 10.0, "rope_grid": None},
    find_hints=_mixed_hints,
    rope_order="interleaved",
    ignored={r"freqs_t_[xy]": CONSTANTS},
    unpack=_rope_unpack,
    pack=_rope_pack,
    options={**_OPTIONS, "rope": ("mixed",)},
    refuses=lambda state, model: (
        _rope_refuses(state, model)
        or ("timm's mixed positions are patch numbers; use --format plsc" if model.rope_grid is not None else None)
    ),
)
ROPE_AXIAL = replace(
    ROPE_MIXED,
    markers=(_HAS_GAMMA, "cls_token", r"blocks\.[0-9]+\.attn\.qkv\.bias"),
    absent=("pos_embed", "reg_token", r"(rope\.)?freqs", r".*\.q_norm\..*", _RELATIVE),
    model_hints={**_ROPE_HINTS, "rope": "axial", "rope_base": 100.0, "rope_grid": IMAGE_GRID},
    assumptions={
        "rope_base": f"{PUBLISHED} 100, the default",
        "rope_grid": f"{PUBLISHED} that of the image, and count its patches",
    },
    find_hints=_size_without_positions,
    rope_order="interleaved_columns_first",
    options=_OPTIONS,
    refuses=_rope_refuses,
)
# The authors' files of DeiT III have the same names and no rotary positions.
ROPE_AXIAL_APE = replace(
    ROPE_AXIAL,
    format="RoPE-ViT's or DeiT III's .safetensors",
    markers=(*ROPE_AXIAL.markers, "pos_embed"),
    absent=ROPE_AXIAL.absent[1:],
    find_undetermined=lambda state: {
        "rope": "no array determines whether it has rotary positions beside its position embedding: none, as DeiT III, "
        "or axial, as RoPE-ViT (rope_axial_ape, timm's vit_*_rope_ape_224)"
    },
)


def _vit5_hints(state: State) -> dict[str, Any]:
    """Return the grid of the position embedding, by which positions are scaled, and the bases of the buffers."""
    hints: dict[str, Any] = {}
    positions, embedding = state.get("pos_embed"), state["patch_embed.proj.weight"]
    side = math.isqrt(positions.shape[1]) if positions is not None and positions.ndim == 3 else 0
    if positions is not None and side and side * side == positions.shape[1]:
        hints["rope_grid"] = (side, side)
    for name, key in (
        ("blocks.0.attn.rope.freqs", "rope_base"),
        ("blocks.0.attn.rope_reg.freqs", "rope_register_base"),
    ):
        if name in state and embedding.ndim and state[name].all():
            found = hints_of_periods(1.0 / state[name], len(embedding), name)
            hints["num_heads"] = found["num_heads"]
            if "rope_base" in found:
                hints[key] = found["rope_base"]
    return hints


VIT5 = NameMap(
    "ViT-5's .safetensors",
    "patch_embed.proj.weight",
    BLOCK,
    EMBEDDINGS | _GAMMAS | norms(_NORMS) | linears(LAYERS, TRANSPOSE),
    markers=(_HAS_GAMMA, r"blocks\.[0-9]+\.attn\.q_norm\.weight", "reg_token", "cls_token", "pos_embed"),
    absent=(r"norm\.bias",),
    model_hints={
        **_EVA_HINTS,
        "class_token_pos_embed": False,
        "rope": "axial",
        "rope_base": 10000.0,
        "rope_grid": (14, 14),
        "rope_register_base": 100.0,
    },
    assumptions={
        "rope_base": f"{PUBLISHED} 10000",
        "rope_grid": f"{PUBLISHED} [14,14]",
        "rope_register_base": f"{PUBLISHED} 100",
    },
    find_hints=_vit5_hints,
    rope_order="interleaved",
    ignored={r"blocks\.[0-9]+\.attn\.rope(_reg)?\.freqs": CONSTANTS},
)

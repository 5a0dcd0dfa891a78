"""Names in PLSC's files and in this program's: the names of every other table's second column."""

from __future__ import annotations

from typing import Any

from vit_static.weights.name_maps import (
    BLOCK,
    EMBEDDINGS,
    IDENTITY,
    LAYERS,
    NORMS,
    SCALES,
    NameMap,
    linears,
    norms,
    same,
)

# Layers of options that PLSC doesn't have, by this program's names.
_OPTIONAL_NORMS = ("norm_pre", "blocks.{}.attn.norm", "blocks.{}.attn.q_norm", "blocks.{}.attn.k_norm")
_OPTIONAL_LINEARS = ("blocks.{}.mlp.gate", *(f"attn_pool.{name}" for name in ("attn.qkv", "attn.proj")))
_MLP_OF_POOL = ("attn_pool.mlp.fc1", "attn_pool.mlp.gate", "attn_pool.mlp.fc2")
PLSC = NameMap(
    "PLSC's or this program's .pdparams",
    "patch_embed.proj.weight",
    BLOCK,
    EMBEDDINGS
    | SCALES
    | same("attn_pool.latent", "blocks.{}.attn.rope.frequencies")
    | same(*(f"{attention}.{part}.bias" for attention in ("blocks.{}.attn", "attn_pool.attn") for part in "qv"))
    | norms(NORMS)
    | norms(
        {f"{name}.": name for name in (*_OPTIONAL_NORMS, "blocks.{}.mlp.norm", "attn_pool.norm", "attn_pool.mlp.norm")}
    )
    | linears({**LAYERS, "head0.": "head0"}, IDENTITY)
    | linears({f"{name}.": name for name in (*_OPTIONAL_LINEARS, *_MLP_OF_POOL)}, IDENTITY),
)
PLSC_HINTS: dict[str, Any] = {"gelu": "erf", "layer_norm_epsilon": 1e-6}

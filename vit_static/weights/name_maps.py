"""Parameter-name maps between other libraries' ViT weights (timm, Hugging Face, vit_jax, big_vision) and PLSC's names,
with the conversion of each array in both directions.

PLSC's names have a fused attn.qkv; formats.split_qkv splits it for the model. To add a format, add a NameMap and detect
it in formats.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Conversion:
    """Functions that convert an array to our layout and back; the way back also gets the number of heads."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray, int], np.ndarray]


IDENTITY = Conversion(lambda x: x, lambda x, _: x)
TRANSPOSE = Conversion(lambda x: x.T, lambda x, _: x.T)  # torch's linear layers are [out, in]
CHANNELS_LAST = Conversion(lambda x: x.transpose(3, 2, 0, 1), lambda x, _: x.transpose(2, 3, 1, 0))  # [p, p, 3, C]
TO_HEADS = Conversion(lambda x: x.reshape(x.shape[0], -1), lambda x, h: x.reshape(x.shape[0], h, -1))  # [C, H, d]
HEADS = Conversion(lambda x: x.reshape(-1), lambda x, h: x.reshape(h, -1))  # biases [H, d]
FROM_HEADS = Conversion(lambda x: x.reshape(-1, x.shape[-1]), lambda x, h: x.reshape(h, -1, x.shape[-1]))  # [H, d, C]

Names = dict[str, tuple[str, Conversion]]  # their name -> our name, conversion


@dataclass(frozen=True)
class NameMap:
    """Names of one format. `{}` in a name is a block's number."""

    format: str  # for people
    block: str  # pattern that begins a block's names and captures its number
    names: Mapping[str, tuple[str, Conversion]]
    model_hints: Mapping[str, Any] = field(default_factory=dict)  # keys of the `model` section: what the program does
    ignored: Mapping[str, str] = field(default_factory=dict)  # pattern of names that the model doesn't need -> reason

    def for_blocks(self, numbers: Iterable[int]) -> Names:
        """Return the names of a model with these blocks."""
        blocks = list(numbers)
        return {
            theirs.format(number): (ours.format(number), conversion)
            for theirs, (ours, conversion) in self.names.items()
            for number in (blocks if "{}" in theirs else [0])
        }

    def blocks_in(self, names: Iterable[str]) -> list[int]:
        """Return the sorted numbers of the blocks that occur in names."""
        return sorted({int(match[1]) for name in names if (match := re.match(self.block, name))})


def _same(*names: str) -> Names:
    return {name: (name, IDENTITY) for name in names}


def _norms(pairs: Mapping[str, str], weight: str = "weight") -> Names:
    return {
        f"{theirs}{suffix}": (f"{ours}.{our_suffix}", IDENTITY)
        for theirs, ours in pairs.items()
        for suffix, our_suffix in ((weight, "weight"), ("bias", "bias"))
    }


def _linears(pairs: Mapping[str, str], conversion: Conversion, kernel: str = "weight") -> Names:
    """Return the names of linear layers; their biases have the same layout everywhere."""
    names: Names = {}
    for theirs, ours in pairs.items():
        names[f"{theirs}{kernel}"] = (f"{ours}.weight", conversion)
        names[f"{theirs}bias"] = (f"{ours}.bias", IDENTITY)
    return names


_PRETRAINING = "is only used in pretraining"

_IN_TORCH = {
    "blocks.{}.attn.qkv.": "blocks.{}.attn.qkv",
    "blocks.{}.attn.proj.": "blocks.{}.attn.proj",
    "blocks.{}.mlp.fc1.": "blocks.{}.mlp.fc1",
    "blocks.{}.mlp.fc2.": "blocks.{}.mlp.fc2",
    "head.": "head",
}
_NORMS_IN_TORCH = {"blocks.{}.norm1.": "blocks.{}.norm1", "blocks.{}.norm2.": "blocks.{}.norm2", "norm.": "norm"}
_EMBEDDINGS = _same("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
_SCALES = _same("blocks.{}.ls1.gamma", "blocks.{}.ls2.gamma")

# Layers of options that PLSC doesn't have, by this program's names.
_OPTIONAL_NORMS = ("norm_pre", "blocks.{}.attn.norm", "blocks.{}.attn.q_norm", "blocks.{}.attn.k_norm")
_OPTIONAL_LINEARS = ("blocks.{}.mlp.gate", *(f"attn_pool.{name}" for name in ("attn.qkv", "attn.proj")))
_MLP_OF_POOL = ("attn_pool.mlp.fc1", "attn_pool.mlp.gate", "attn_pool.mlp.fc2")
PLSC = NameMap(
    "PLSC's or this program's .pdparams",
    r"blocks\.([0-9]{1,4})\.",
    _EMBEDDINGS
    | _SCALES
    | _same("attn_pool.latent", "blocks.{}.attn.rope.frequencies")
    | _same(*(f"{attention}.{part}.bias" for attention in ("blocks.{}.attn", "attn_pool.attn") for part in "qv"))
    | _norms(_NORMS_IN_TORCH)
    | _norms(
        {f"{name}.": name for name in (*_OPTIONAL_NORMS, "blocks.{}.mlp.norm", "attn_pool.norm", "attn_pool.mlp.norm")}
    )
    | _linears({**_IN_TORCH, "head0.": "head0"}, IDENTITY)
    | _linears({f"{name}.": name for name in (*_OPTIONAL_LINEARS, *_MLP_OF_POOL)}, IDENTITY),
)
PLSC_HINTS: dict[str, Any] = {"gelu": "erf", "layer_norm_epsilon": 1e-6}
TIMM = NameMap(
    "timm's .safetensors",
    r"blocks\.([0-9]{1,4})\.",
    _EMBEDDINGS
    | _SCALES
    | _norms({**_NORMS_IN_TORCH, "fc_norm.": "norm"})
    | _linears({**_IN_TORCH, "pre_logits.fc.": "head0"}, TRANSPOSE),
    model_hints={"gelu": "erf", "layer_norm_epsilon": 1e-6},
    ignored={r"mask_token": _PRETRAINING, r"decoder_.*|decoder\..*": _PRETRAINING},
)
_HF_BLOCK = "encoder.layer.{}."
_HF_QKV = {
    f"{_HF_BLOCK}attention.attention.{name}.": f"blocks.{{}}.attn.{name[0]}" for name in ("query", "key", "value")
}
_HF_EMBEDDINGS: Names = {
    "embeddings.cls_token": ("cls_token", IDENTITY),
    "embeddings.register_tokens": ("reg_token", IDENTITY),
    "embeddings.position_embeddings": ("pos_embed", IDENTITY),
    "embeddings.patch_embeddings.projection.weight": ("patch_embed.proj.weight", IDENTITY),
    "embeddings.patch_embeddings.projection.bias": ("patch_embed.proj.bias", IDENTITY),
}
HF_VIT = NameMap(
    "Hugging Face ViT's .safetensors",
    r"encoder\.layer\.([0-9]{1,4})\.",
    _HF_EMBEDDINGS
    | _norms(
        {
            f"{_HF_BLOCK}layernorm_before.": "blocks.{}.norm1",
            f"{_HF_BLOCK}layernorm_after.": "blocks.{}.norm2",
            "layernorm.": "norm",
        }
    )
    | _linears(
        {
            **_HF_QKV,
            f"{_HF_BLOCK}attention.output.dense.": "blocks.{}.attn.proj",
            f"{_HF_BLOCK}intermediate.dense.": "blocks.{}.mlp.fc1",
            f"{_HF_BLOCK}output.dense.": "blocks.{}.mlp.fc2",
            "classifier.": "head",
        },
        TRANSPOSE,
    ),
    model_hints={"gelu": "erf", "layer_norm_epsilon": 1e-12, "class_token_pos_embed": True},
    ignored={
        r"embeddings\.mask_token": _PRETRAINING,
        r"decoder\..*": _PRETRAINING,
        r"pooler\.dense\..*": "is not read by Hugging Face's classifier",
    },
)
HF_DINOV2 = NameMap(
    "Hugging Face DINOv2's .safetensors",
    r"encoder\.layer\.([0-9]{1,4})\.",
    _HF_EMBEDDINGS
    | {f"{_HF_BLOCK}layer_scale{branch}.lambda1": (f"blocks.{{}}.ls{branch}.gamma", IDENTITY) for branch in (1, 2)}
    | _norms({f"{_HF_BLOCK}norm1.": "blocks.{}.norm1", f"{_HF_BLOCK}norm2.": "blocks.{}.norm2", "layernorm.": "norm"})
    | _linears(
        {
            **_HF_QKV,
            f"{_HF_BLOCK}attention.output.dense.": "blocks.{}.attn.proj",
            f"{_HF_BLOCK}mlp.fc1.": "blocks.{}.mlp.fc1",
            f"{_HF_BLOCK}mlp.fc2.": "blocks.{}.mlp.fc2",
            "classifier.": "head",
        },
        TRANSPOSE,
    ),
    model_hints={"gelu": "erf", "layer_norm_epsilon": 1e-6, "class_token_pos_embed": True},
    ignored={r"embeddings\.mask_token": _PRETRAINING},
)


def _google(
    name: str, attention: str, norms: tuple[str, str], mlp: str, position: str, class_token_pos_embed: bool
) -> NameMap:
    """Return the table of one of Flax's layouts, which differ in how they number the modules of a block."""
    block = "Transformer/encoderblock_{}/"
    return NameMap(
        name,
        r"Transformer/encoderblock_([0-9]{1,4})/",
        {
            "cls": ("cls_token", IDENTITY),
            position: ("pos_embed", IDENTITY),
            "embedding/kernel": ("patch_embed.proj.weight", CHANNELS_LAST),
            "embedding/bias": ("patch_embed.proj.bias", IDENTITY),
            f"{block}{attention}/out/kernel": ("blocks.{}.attn.proj.weight", FROM_HEADS),
            f"{block}{attention}/out/bias": ("blocks.{}.attn.proj.bias", IDENTITY),
        }
        | {
            f"{block}{attention}/{part}/{suffix}": (f"blocks.{{}}.attn.{part[0]}.{our_suffix}", conversion)
            for part in ("query", "key", "value")
            for suffix, our_suffix, conversion in (("kernel", "weight", TO_HEADS), ("bias", "bias", HEADS))
        }
        | _norms(
            {
                f"{block}{norms[0]}/": "blocks.{}.norm1",
                f"{block}{norms[1]}/": "blocks.{}.norm2",
                "Transformer/encoder_norm/": "norm",
            },
            "scale",
        )
        | _linears(
            {
                f"{block}{mlp}/Dense_0/": "blocks.{}.mlp.fc1",
                f"{block}{mlp}/Dense_1/": "blocks.{}.mlp.fc2",
                "pre_logits/": "head0",
                "head/": "head",
            },
            IDENTITY,
            "kernel",
        ),
        model_hints={"gelu": "tanh", "layer_norm_epsilon": 1e-6, "class_token_pos_embed": class_token_pos_embed},
    )


# The names of attention, norms and MLP in a block: Flax once numbered all modules in one sequence, and now by class.
_NUMBERED_IN_SEQUENCE = ("MultiHeadDotProductAttention_1", ("LayerNorm_0", "LayerNorm_2"), "MlpBlock_3")
_NUMBERED_BY_CLASS = ("MultiHeadDotProductAttention_0", ("LayerNorm_0", "LayerNorm_1"), "MlpBlock_0")
WITH_CLASS, _WITHOUT_CLASS = "Transformer/posembed_input/pos_embedding", "pos_embedding"
VIT_JAX = _google("vit_jax's .npz", *_NUMBERED_IN_SEQUENCE, WITH_CLASS, class_token_pos_embed=True)
VIT_JAX_BY_CLASS = _google("vit_jax's .npz", *_NUMBERED_BY_CLASS, WITH_CLASS, class_token_pos_embed=True)
BIG_VISION = _google("big_vision's .npz", *_NUMBERED_BY_CLASS, _WITHOUT_CLASS, class_token_pos_embed=False)

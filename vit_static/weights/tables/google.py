"""Names in Google's .npz files: vit_jax (with AugReg) and big_vision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit_static.config.model_schema import ModelConfig
from vit_static.weights.name_maps import (
    CHANNELS_LAST,
    FROM_HEADS,
    HEADS,
    IDENTITY,
    MAX_BLOCKS,
    NOT_IN_TOWER,
    TO_HEADS,
    NameMap,
    Names,
    linears,
    norms,
)
from vit_static.weights.state import State

_STACKED = "Transformer/encoderblock/"
_WITH_CLASS, _WITHOUT_CLASS = "Transformer/posembed_input/pos_embedding", "pos_embedding"


def _unstack_blocks(state: State) -> State:
    """Separate the blocks that big_vision stacks along the first axis of each array (`scan`).

    Raises ValueError for an array of too many blocks.
    """
    arrays = {name: array for name, array in state.items() if not name.startswith(_STACKED)}
    for name, array in state.items():
        if name.startswith(_STACKED) and array.ndim > 0:
            if len(array) > MAX_BLOCKS:
                raise ValueError(f"{name} has the shape {list(array.shape)}, which is more than {MAX_BLOCKS} blocks")
            for number, of_block in enumerate(array):
                arrays[f"Transformer/encoderblock_{number}/{name.removeprefix(_STACKED)}"] = of_block
    return arrays


def _unpack(state: State) -> State:
    """Separate stacked blocks, and give SigLIP 2 NaFlex's linear patch embedding [p p 3, C] and its table of positions
    [rows, columns, C] the layout of the other files.

    Raises ValueError for an array of an impossible shape.
    """
    arrays = _unstack_blocks(state)
    kernel, positions = (arrays.get(name, np.zeros(0)) for name in ("embedding/kernel", _WITHOUT_CLASS))
    if kernel.ndim == 2:
        side = math.isqrt(len(kernel) // 3)
        if 3 * side * side != len(kernel):
            raise ValueError(f"embedding/kernel has the shape {list(kernel.shape)}, which is no square RGB patch")
        arrays["embedding/kernel"] = kernel.reshape(side, side, 3, -1)
        if positions.ndim == 3:
            arrays[_WITHOUT_CLASS] = positions.reshape(1, -1, positions.shape[-1])
    return arrays


def _find_num_heads(state: State) -> dict[str, Any]:
    """Return the number of heads, which queries have as an axis."""
    queries = [array for name, array in state.items() if name.endswith("/query/kernel") and array.ndim == 3]
    return {"num_heads": queries[-1].shape[1]} if queries else {}


def _attention(theirs: str, ours: str) -> Names:
    """Return the names of Flax's multi-head attention, whose arrays have an axis for the heads."""
    names: Names = {
        f"{theirs}/{part}/{suffix}": (f"{ours}.{part[0]}.{our_suffix}", conversion)
        for part in ("query", "key", "value")
        for suffix, our_suffix, conversion in (("kernel", "weight", TO_HEADS), ("bias", "bias", HEADS))
    }
    names[f"{theirs}/out/kernel"] = (f"{ours}.proj.weight", FROM_HEADS)
    names[f"{theirs}/out/bias"] = (f"{ours}.proj.bias", IDENTITY)
    return names


_POOL: Names = (  # big_vision's attention pooling
    {"MAPHead_0/probe": ("attn_pool.latent", IDENTITY)}
    | _attention("MAPHead_0/MultiHeadDotProductAttention_0", "attn_pool.attn")
    | norms({"MAPHead_0/LayerNorm_0/": "attn_pool.norm"}, "scale")
    | linears(
        {
            "MAPHead_0/MlpBlock_0/Dense_0/": "attn_pool.mlp.fc1",
            "MAPHead_0/MlpBlock_0/Dense_1/": "attn_pool.mlp.fc2",
        },
        IDENTITY,
        "kernel",
    )
)
# The text tower of SigLIP is below txt/, and its temperature and bias are beside the towers.
_OUTSIDE = {r"(.*/)?(txt/.*|t|b)": NOT_IN_TOWER, r".*": "is not part of the model"}


def _google(
    name: str,
    attention: str,
    norm_names: tuple[str, str],
    mlp: str,
    position: str,
    class_token_pos_embed: bool,
    markers: tuple[str, ...],
    refuses: Callable[[Mapping[str, np.ndarray], ModelConfig], str | None],
    prefix: str = "",
    pools: bool = False,
) -> NameMap:
    """Return the table of one of Flax's layouts, which differ in how they number the modules of a block."""
    block = "Transformer/encoderblock_{}/"
    return NameMap(
        name,
        "embedding/kernel",
        r"Transformer/encoderblock_([0-9]{1,4})/",
        {
            "cls": ("cls_token", IDENTITY),
            position: ("pos_embed", IDENTITY),
            "embedding/kernel": ("patch_embed.proj.weight", CHANNELS_LAST),
            "embedding/bias": ("patch_embed.proj.bias", IDENTITY),
        }
        | _attention(f"{block}{attention}", "blocks.{}.attn")
        | norms(
            {
                f"{block}{norm_names[0]}/": "blocks.{}.norm1",
                f"{block}{norm_names[1]}/": "blocks.{}.norm2",
                "Transformer/encoder_norm/": "norm",
            },
            "scale",
        )
        | linears(
            {
                f"{block}{mlp}/Dense_0/": "blocks.{}.mlp.fc1",
                f"{block}{mlp}/Dense_1/": "blocks.{}.mlp.fc2",
                "pre_logits/": "head0",
                "head/": "head",
            },
            IDENTITY,
            "kernel",
        )
        | (_POOL if pools else {}),
        markers=markers,
        model_hints={"gelu": "tanh", "layer_norm_epsilon": 1e-6, "class_token_pos_embed": class_token_pos_embed},
        outside=_OUTSIDE,
        unpack=_unpack,
        find_hints=_find_num_heads,
        prefix=prefix,
        options={"pool": ("map",)} if pools else {},
        refuses=refuses,
    )


def _refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    """Return why neither vit_jax nor big_vision has a model."""
    if model.fc_norm:
        return "this model's last norm comes after the pooling, which google doesn't have; use --format timm"
    if "blocks.0.ls1.gamma" in state:
        return "Google's ViT has no LayerScale; fold it into the weights with --fold-layer-scale"
    if model.register_tokens or model.pool == "cls_gap":
        return "Google's ViT has neither registers nor both poolings at once; use --format timm or huggingface"
    if model.pool in ("gap", "map") and model.has_class_token:
        pools = "averages the patches; use --format timm" if model.pool == "gap" else "pools by attention"
        return f"Google's ViT has no class token if it {pools}"
    return None


def _has_positions_of_all(state: Mapping[str, np.ndarray], model: ModelConfig) -> bool:
    return "pos_embed" in state and (model.class_token_pos_embed or not model.has_class_token)


def _vit_jax_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    without = None if _has_positions_of_all(state, model) else "vit_jax's class token and patches have positions"
    return _refuses(state, model) or without


# The names of attention, norms and MLP in a block: Flax once numbered all modules in one sequence, and now by class.
_NUMBERED_IN_SEQUENCE = ("MultiHeadDotProductAttention_1", ("LayerNorm_0", "LayerNorm_2"), "MlpBlock_3")
_NUMBERED_BY_CLASS = ("MultiHeadDotProductAttention_0", ("LayerNorm_0", "LayerNorm_1"), "MlpBlock_0")
_BY_CLASS = r".*/MlpBlock_0/.*"
VIT_JAX = _google("vit_jax's .npz", *_NUMBERED_IN_SEQUENCE, _WITH_CLASS, True, (), _vit_jax_refuses)
VIT_JAX_BY_CLASS = _google(
    "vit_jax's .npz", *_NUMBERED_BY_CLASS, _WITH_CLASS, True, (_BY_CLASS, _WITH_CLASS), _vit_jax_refuses
)
# big_vision reads only what is below params/ if there is any.
BIG_VISION = _google(
    "big_vision's .npz",
    *_NUMBERED_BY_CLASS,
    _WITHOUT_CLASS,
    False,
    (_BY_CLASS,),
    _refuses,
    prefix="params/",
    pools=True,
)

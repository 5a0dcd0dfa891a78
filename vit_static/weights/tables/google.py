"""Names in Google's .npz files: vit_jax (with AugReg) and big_vision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit_static.config.model_schema import ModelConfig
from vit_static.weights.name_maps import (
    CHANNELS_LAST,
    FROM_HEADS,
    HEADS,
    IDENTITY,
    TO_HEADS,
    NameMap,
    linears,
    norms,
)
from vit_static.weights.state import State

_MAX_BLOCKS = 1000
_STACKED = "Transformer/encoderblock/"


def _unstack_blocks(state: State) -> State:
    """Separate the blocks that big_vision stacks along the first axis of each array (`scan`).

    Raises ValueError for an array of too many blocks.
    """
    arrays = {name: array for name, array in state.items() if not name.startswith(_STACKED)}
    for name, array in state.items():
        if name.startswith(_STACKED) and array.ndim > 0:
            if len(array) > _MAX_BLOCKS:
                raise ValueError(f"{name} has the shape {list(array.shape)}, which is more than {_MAX_BLOCKS} blocks")
            for number, of_block in enumerate(array):
                arrays[f"Transformer/encoderblock_{number}/{name.removeprefix(_STACKED)}"] = of_block
    return arrays


def _find_num_heads(state: State) -> dict[str, Any]:
    """Return the number of heads, which queries have as an axis."""
    queries = [array for name, array in state.items() if name.endswith("/query/kernel") and array.ndim == 3]
    return {"num_heads": queries[-1].shape[1]} if queries else {}


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
            f"{block}{attention}/out/kernel": ("blocks.{}.attn.proj.weight", FROM_HEADS),
            f"{block}{attention}/out/bias": ("blocks.{}.attn.proj.bias", IDENTITY),
        }
        | {
            f"{block}{attention}/{part}/{suffix}": (f"blocks.{{}}.attn.{part[0]}.{our_suffix}", conversion)
            for part in ("query", "key", "value")
            for suffix, our_suffix, conversion in (("kernel", "weight", TO_HEADS), ("bias", "bias", HEADS))
        }
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
        ),
        markers=markers,
        model_hints={"gelu": "tanh", "layer_norm_epsilon": 1e-6, "class_token_pos_embed": class_token_pos_embed},
        ignores_outside=True,
        unpack=_unstack_blocks,
        find_hints=_find_num_heads,
        prefix=prefix,
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
    if model.pool == "gap" and model.has_class_token:
        return "Google's ViT has no class token if it averages the patches; use --format timm"
    return None


def _has_positions_of_all(state: Mapping[str, np.ndarray], model: ModelConfig) -> bool:
    return "pos_embed" in state and (model.class_token_pos_embed or not model.has_class_token)


def _vit_jax_refuses(state: Mapping[str, np.ndarray], model: ModelConfig) -> str | None:
    without = None if _has_positions_of_all(state, model) else "vit_jax's class token and patches have positions"
    return _refuses(state, model) or without


# The names of attention, norms and MLP in a block: Flax once numbered all modules in one sequence, and now by class.
_NUMBERED_IN_SEQUENCE = ("MultiHeadDotProductAttention_1", ("LayerNorm_0", "LayerNorm_2"), "MlpBlock_3")
_NUMBERED_BY_CLASS = ("MultiHeadDotProductAttention_0", ("LayerNorm_0", "LayerNorm_1"), "MlpBlock_0")
_WITH_CLASS, _WITHOUT_CLASS = "Transformer/posembed_input/pos_embedding", "pos_embedding"
_BY_CLASS = r".*/MlpBlock_0/.*"
VIT_JAX = _google("vit_jax's .npz", *_NUMBERED_IN_SEQUENCE, _WITH_CLASS, True, (), _vit_jax_refuses)
VIT_JAX_BY_CLASS = _google(
    "vit_jax's .npz", *_NUMBERED_BY_CLASS, _WITH_CLASS, True, (_BY_CLASS, _WITH_CLASS), _vit_jax_refuses
)
# big_vision reads only what is below params/ if there is any.
BIG_VISION = _google(
    "big_vision's .npz", *_NUMBERED_BY_CLASS, _WITHOUT_CLASS, False, (_BY_CLASS,), _refuses, prefix="params/"
)

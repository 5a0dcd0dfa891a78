"""Formats of weight files, this program's and others', detected by content and never by name.

A state is a dict of float32 arrays by name, in PLSC's names and layout, called "the files' layout" elsewhere:

    cls_token [1, 1, C]   reg_token [1, R, C]   pos_embed [1, positions, C]
    patch_embed.proj.weight [C, channels, p, p]  .bias
    blocks.N.norm1, .norm2; .attn.qkv [C, 3 C], .attn.proj; .mlp.fc1, .mlp.fc2; .ls1.gamma, .ls2.gamma
    norm   head0 (the tanh layer)   head         linear layers are [in, out]

Every other format is a table of names and conversions (name_maps.py); the same table reads and writes. What a file says
about its model besides the shapes of its arrays, and what its program always does, is in `ExternalWeights.model_hints`
by the keys of the config's `model` section.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from vit_static.common.errors import WeightsError, format_value
from vit_static.common.io import write_atomically, write_json
from vit_static.config.model_schema import ModelConfig
from vit_static.weights.architectures import unsupported_reason
from vit_static.weights.model_record import RECORD_NAME, encode_record
from vit_static.weights.name_maps import (
    BIG_VISION,
    HF_DINOV2,
    HF_VIT,
    PLSC,
    PLSC_HINTS,
    TIMM,
    VIT_JAX,
    VIT_JAX_BY_CLASS,
    WITH_CLASS,
    NameMap,
)
from vit_static.weights.readers import read_arrays

State = dict[str, np.ndarray]
FormatName = Literal["plsc", "timm", "huggingface", "google"]


@dataclass(frozen=True)
class ExternalWeights:
    """Content of a weight file, in our names and layout."""

    state: State
    format: str  # for people
    model_hints: dict[str, Any] = field(default_factory=dict)  # keys of the `model` section
    dropped: dict[str, str] = field(default_factory=dict)  # array that the model doesn't need -> reason
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
    reason = unsupported_reason(state)
    if reason is not None and content.model is None:
        raise WeightsError(f"{path}: {reason}; use weights of a plain ViT, DeiT, MAE, DINO or DINOv2")
    external = _from_paddle(state, path) if content.container == "paddle" else _from_names(state, path)
    dropped = dict.fromkeys(content.outside, "is not part of the state dict") | external.dropped
    others = {name: "is no array of floating-point numbers" for name, array in content.arrays.items() if array is None}
    return replace(external, dropped=dropped | others, model=content.model)


def _from_paddle(state: State, path: Path) -> ExternalWeights:
    embedding = min((name for name in state if name.endswith(_PATCHES)), key=len, default=_PATCHES)
    external = _translate(_strip_prefix(state, embedding.removesuffix(_PATCHES), path), PLSC, path)
    fc1 = external.state.get("blocks.0.mlp.fc1.weight")
    has_bias = "blocks.0.attn.qkv.bias" in external.state
    if fc1 is not None and fc1.shape == (768, 2304) and not has_bias and len(PLSC.blocks_in(external.state)) == 8:
        raise WeightsError(
            f"{path}: is PaddleClas's ViT_small, which divides attention scores by the root of its width where this "
            "model divides by that of a head's channels; use another of its models"
        )
    return external


_PATCHES = "patch_embed.proj.weight"


def _from_names(state: State, path: Path) -> ExternalWeights:
    """Detect the program that wrote a file by its arrays' names."""
    for ending, convert in (
        ("embedding/kernel", _from_google),
        ("embeddings.patch_embeddings.projection.weight", _from_huggingface),
        (_PATCHES, _from_timm),
    ):
        embedding = min((name for name in state if name.endswith(ending)), key=len, default=None)
        if embedding is not None:
            return convert(state, embedding.removesuffix(ending), path)
    shown = ", ".join(sorted(state)[:3]) or "none"
    raise WeightsError(
        f"{path}: has the weights of no known Vision Transformer (its first arrays: {shown}); use a file of PLSC, "
        "timm, Hugging Face, vit_jax or big_vision"
    )


def _from_timm(state: State, prefix: str, path: Path) -> ExternalWeights:
    return _translate(_strip_prefix(state, prefix, path), TIMM, path)


def _strip_prefix(state: State, prefix: str, path: Path) -> State:
    """Remove a prefix from the names that have it."""
    stripped = {name.removeprefix(prefix): array for name, array in state.items()}
    if len(stripped) < len(state):
        raise WeightsError(f"{path}: has an array of the same name with and without {prefix!r}; remove one of them")
    return stripped


def _from_google(state: State, prefix: str, path: Path) -> ExternalWeights:
    arrays = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    outside = {name: "is not part of the model" for name in state if not name.startswith(prefix)}
    arrays = _unstack_blocks(arrays, path)
    is_numbered_by_class = any("/MlpBlock_0/" in name for name in arrays)
    table = (VIT_JAX_BY_CLASS if WITH_CLASS in arrays else BIG_VISION) if is_numbered_by_class else VIT_JAX
    external = _translate(arrays, table, path)
    for name, array in arrays.items():
        if name.endswith("/query/kernel") and array.ndim == 3:
            external.model_hints["num_heads"] = array.shape[1]
    return replace(external, dropped=external.dropped | outside)


_MAX_BLOCKS = 1000


def _unstack_blocks(state: State, path: Path) -> State:
    """Separate the blocks that big_vision stacks along the first axis of each array (`scan`)."""
    stacked = "Transformer/encoderblock/"
    arrays = {name: array for name, array in state.items() if not name.startswith(stacked)}
    for name, array in state.items():
        if name.startswith(stacked) and array.ndim > 0:
            if len(array) > _MAX_BLOCKS:
                raise WeightsError(
                    f"{path}: {name} has the shape {list(array.shape)}, which is more than {_MAX_BLOCKS} blocks"
                )
            for number, of_block in enumerate(array):
                arrays[f"Transformer/encoderblock_{number}/{name.removeprefix(stacked)}"] = of_block
    return arrays


def _from_huggingface(state: State, prefix: str, path: Path) -> ExternalWeights:
    arrays = _strip_prefix(state, prefix, path)
    table = HF_DINOV2 if any(".layer_scale1." in name for name in arrays) else HF_VIT
    external = _translate(arrays, table, path)
    return replace(external, model_hints=external.model_hints | _read_hf_hints(path.with_name("config.json")))


def _read_hf_hints(path: Path) -> dict[str, Any]:
    """Read model hints from Hugging Face's config.json next to the weights; none if it isn't there or isn't JSON."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    model_hints: dict[str, Any] = {}
    if isinstance(config, dict):
        for theirs, ours, kind, maximum in (
            ("num_attention_heads", "num_heads", int, 10_000),
            ("layer_norm_eps", "layer_norm_epsilon", float, 1.0),
        ):
            if type(config.get(theirs)) is kind:
                if not 0 < config[theirs] <= maximum:
                    raise WeightsError(f"{path}: {theirs} is {format_value(config[theirs])}, which no model has")
                model_hints[ours] = config[theirs]
        activation = config.get("hidden_act", "gelu")
        if activation in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
            model_hints["gelu"] = "tanh"
        elif activation not in ("gelu", "gelu_python"):
            raise WeightsError(f"{path}: hidden_act is {format_value(activation)}, and this model only has GELU")
    return model_hints


def _translate(state: State, table: NameMap, path: Path) -> ExternalWeights:
    """Convert a file's arrays to our names and layout.

    Raises WeightsError for an array that the table neither has nor ignores, and for one of an impossible shape.
    """
    names = table.for_blocks(table.blocks_in(state))
    arrays: State = {}
    dropped: dict[str, str] = {}
    unexpected = []
    for name, array in state.items():
        if reason := _matching(table.ignored, name):
            dropped[name] = reason
        elif name not in names:
            unexpected.append(name)
        else:
            our_name, conversion = names[name]
            if our_name in arrays:
                raise WeightsError(f"{path}: has several arrays for {our_name}, {name} among them; remove all but one")
            if ".attn.qkv." in our_name and (array.ndim == 0 or array.shape[0 if table is TIMM else -1] % 3):
                raise _wrong_shape(path, name, array, "query, key and value")
            try:
                arrays[our_name] = np.ascontiguousarray(conversion.to_ours(array)) if array.ndim else array
            except (ValueError, IndexError):
                raise _wrong_shape(path, name, array, our_name) from None
            if arrays[our_name].ndim not in _num_axes(our_name) or not arrays[our_name].size:
                raise _wrong_shape(path, name, array, our_name)
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise WeightsError(
            f"{path}: looks like {table.format}, but has {unexpected[0]}{more}, which those files don't have"
        )
    try:
        fused = fuse_qkv(arrays)
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: its queries, keys and values don't belong together ({error})") from None
    hints = dict(table.model_hints) | _pooling_hints(arrays, has_fc_norm="fc_norm.weight" in state)
    return ExternalWeights(fused, table.format, hints, dropped)


def _matching(reasons: Mapping[str, str], name: str) -> str | None:
    """Return the reason of the first pattern that matches a name."""
    return next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, name)), None)


def _wrong_shape(path: Path, name: str, array: np.ndarray, expected: str) -> WeightsError:
    return WeightsError(f"{path}: {name} has the shape {list(array.shape)}, which doesn't fit {expected}")


def _num_axes(name: str) -> tuple[int, ...]:
    """Return how many axes an array may have, by our name for it."""
    if name in ("pos_embed", "cls_token", "reg_token", "attn_pool.latent"):
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
    embedding, head = state.get("patch_embed.proj.weight"), state.get("head0.weight", state.get("head.weight"))
    if embedding is not None and head is not None and head.shape[:1] == (2 * embedding.shape[0],):
        return {"pool": "cls_gap"}
    return {"pool": "cls" if "cls_token" in state else "gap"}


def fuse_qkv(state: Mapping[str, np.ndarray]) -> State:
    """Convert the layers' names to the files': concatenate ``attn.{q,k,v}.*`` to ``attn.qkv.*`` along the last axis.

    Biases stay separate where keys have none. Raises KeyError if one of the three is missing, ValueError if their
    shapes differ.
    """
    fused = {}
    for name, value in state.items():
        if _is_bias_without_that_of_keys(name, state):
            fused[name] = value
        elif ".attn.q." in name:
            parts = [state[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"{name} has the shape {list(parts[0].shape)}, unlike the others")
            fused[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate(parts, axis=-1)
        elif ".attn.k." not in name and ".attn.v." not in name:
            fused[name] = value
        elif name.replace(".attn.k.", ".attn.q.").replace(".attn.v.", ".attn.q.") not in state:
            raise KeyError(name)
    return fused


def _is_bias_without_that_of_keys(name: str, state: Mapping[str, np.ndarray]) -> bool:
    """Return whether a name is that of the queries' or values' biases in a model with `qkv_bias: qv`."""
    match = re.fullmatch(r"(.*\.attn\.)[qv]\.bias", name)
    return match is not None and all((f"{match[1]}{part}.bias" in state) == (part != "k") for part in "qkv")


def split_qkv(state: Mapping[str, np.ndarray]) -> State:
    """Convert the files' names to the layers'; the inverse of `fuse_qkv`."""
    split = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for part, columns in zip("qkv", np.split(value, 3, axis=-1), strict=True):
                split[name.replace(".attn.qkv.", f".attn.{part}.")] = columns
        else:
            split[name] = value
    return split


# -- writing ---------------------------------------------------------------------------------------------------------


def write_weights(
    state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int, path: Path, to: FormatName
) -> None:
    """Write a state in another program's format; for Hugging Face also the config.json next to it that it needs.

    Raises WeightsError if the other program doesn't have this model.
    """
    table = _table_for(state, model, to)
    config_path = path.with_name("config.json")
    if to == "huggingface" and config_path.exists():
        raise WeightsError(f"{config_path}: exists already, and would be overwritten; choose another folder")
    remaining = dict(state) if table is TIMM else split_qkv(state)
    converted: State = {}
    for theirs, (ours, conversion) in table.for_blocks(PLSC.blocks_in(state)).items():
        if ours in remaining and _is_name_of_norm(theirs, model):
            converted[theirs] = np.ascontiguousarray(conversion.to_theirs(remaining.pop(ours), num_heads))
    if remaining:
        raise WeightsError(f"{path}: {table.format} has no {next(iter(remaining))}")
    record = encode_record(model)
    metadata = {"format": "pt", RECORD_NAME: record}
    with write_atomically(path, sum(array.nbytes for array in converted.values())) as temporary:
        if to == "google":
            # big_vision reads only what is below params/ if there is any, and vit_jax ignores an array more.
            prefix = "params/" if table is BIG_VISION else ""
            named = {f"{prefix}{name}": array for name, array in converted.items()}
            named[RECORD_NAME] = np.frombuffer(record.encode(), np.uint8)
            with temporary.open("wb") as file:
                np.savez(file, **named)  # type: ignore[arg-type]
        elif to == "timm":
            save_file(converted, temporary, metadata)
        else:
            prefix = _hf_model_type(state)
            if "reg_token" in state:  # from_pretrained expects a mask token
                converted["embeddings.mask_token"] = np.zeros_like(state["cls_token"][0])
            named = {k if k.startswith("classifier.") else f"{prefix}.{k}": v for k, v in converted.items()}
            save_file(named, temporary, metadata)
    if to == "huggingface":  # after the weights, so that a config.json always has its weights
        write_json(_hf_config(state, model, num_heads), config_path)


def list_differences(state: Mapping[str, np.ndarray], model: ModelConfig, to: FormatName) -> list[str]:
    """Return one sentence for each thing that the other program computes differently, and its file can't say."""
    hints = PLSC_HINTS if to == "plsc" else {} if to == "huggingface" else _table_for(state, model, to).model_hints
    return [
        f"{to} computes with model.{key}={hints[key]}, and this model with {getattr(model, key)}"
        for key in ("gelu", "layer_norm_epsilon")
        if key in hints and hints[key] != getattr(model, key)
    ]


# Keys of models that no table but PLSC's, which is this program's own, has names for.
_OWN_OPTIONS = ("rope", "qk_norm", "norm", "mlp", "mlp_norm", "attention_norm", "pre_norm")


def _is_name_of_norm(theirs: str, model: ModelConfig) -> bool:
    """Tell, for timm's two names of the last norm, whether it is this model's; True for every other name."""
    return not theirs.startswith(("norm.", "fc_norm.")) or theirs.startswith("fc_norm.") == model.fc_norm


def _table_for(state: Mapping[str, np.ndarray], model: ModelConfig, to: FormatName) -> NameMap:
    """Return the table of a format. Raises WeightsError if its program would compute something else."""
    option = next((key for key in _OWN_OPTIONS if model.is_changed(key)), None)
    if option is not None or model.pool == "map" or model.pos_embed == "none" or model.gelu == "quick":
        key = option or next(key for key in ("gelu", "pos_embed", "pool") if model.is_changed(key))
        raise WeightsError(
            f"model.{key} = {getattr(model, key)}: this version writes such a model only as a .pdparams file; use "
            "--format plsc"
        )
    has_scale = "blocks.0.ls1.gamma" in state
    is_fixed = "pos_embed" not in state
    if is_fixed and to != "google":
        raise WeightsError(f"{to}'s files have a position embedding, and this model's is fixed; use --format google")
    if to == "timm":
        if model.representation_size:
            raise WeightsError("timm's ViT has no representation layer before its head; use --head drop")
        if model.pool == "cls_gap":
            raise WeightsError(
                "timm's head reads the class token or the mean, and this model's both; use --format huggingface"
            )
        return TIMM
    if model.fc_norm:
        raise WeightsError(
            f"this model's last norm comes after the pooling, which {to} doesn't have; use --format timm"
        )
    if to == "google":
        if has_scale:
            raise WeightsError("Google's ViT has no LayerScale; fold it into the weights with --fold-layer-scale")
        if model.register_tokens or model.pool == "cls_gap":
            raise WeightsError(
                "Google's ViT has neither registers nor both poolings at once; use --format timm or huggingface"
            )
        if model.pool == "gap" and model.has_class_token:
            raise WeightsError("Google's ViT has no class token if it averages the patches; use --format timm")
        has_all_positions = model.class_token_pos_embed or not model.has_class_token
        return BIG_VISION if is_fixed or not has_all_positions else VIT_JAX
    has_head = "head.weight" in state  # without one, what it would read makes no difference
    if (has_head and model.pool == "gap") or not model.has_class_token or not model.class_token_pos_embed:
        raise WeightsError("Hugging Face's head reads the class token, which has a position; use --format timm")
    if (
        (has_head and (model.pool == "cls_gap") != has_scale)
        or model.representation_size
        or (model.register_tokens and not has_scale)
    ):
        raise WeightsError(
            "Hugging Face has ViT (class token, no LayerScale) and DINOv2 (both poolings, LayerScale), and this model "
            "is neither; use --format timm, or --fold-layer-scale"
        )
    return HF_DINOV2 if has_scale else HF_VIT


def _hf_model_type(state: Mapping[str, np.ndarray]) -> str:
    """Return the `model_type` in config.json, which is also the prefix of the names."""
    if "blocks.0.ls1.gamma" not in state:
        return "vit"
    return "dinov2_with_registers" if "reg_token" in state else "dinov2"


def _hf_config(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int) -> dict[str, Any]:
    """Return the content of config.json."""
    model_type = _hf_model_type(state)
    width, mlp_dim = state["blocks.0.mlp.fc1.weight"].shape
    image_height, image_width = model.image_size
    class_name = {"vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[model_type]
    common = {
        "architectures": [f"{class_name}{'ForImageClassification' if 'head.bias' in state else 'Model'}"],
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": len(PLSC.blocks_in(state)),
        "num_attention_heads": num_heads,
        "num_channels": state["patch_embed.proj.weight"].shape[1],
        "patch_size": state["patch_embed.proj.weight"].shape[2],
        "image_size": image_height if image_height == image_width else [image_height, image_width],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "layer_norm_eps": model.layer_norm_epsilon,
        "hidden_act": "gelu" if model.gelu == "erf" else "gelu_pytorch_tanh",
    }
    if "head.bias" in state:
        common["id2label"] = {str(label): f"LABEL_{label}" for label in range(len(state["head.bias"]))}
    if model_type == "vit":
        return {**common, "intermediate_size": mlp_dim}
    ratio = mlp_dim / width  # transformers 5 wants an int where it can be one
    dinov2_keys = {"mlp_ratio": int(ratio) if ratio.is_integer() else ratio, "use_swiglu_ffn": False}
    if model_type == "dinov2":
        return {**common, **dinov2_keys, "use_mask_token": False}
    return {**common, **dinov2_keys, "num_register_tokens": state["reg_token"].shape[1]}

"""Files of weights, this program's and others': what they are is told by their content, never by their names.

A state is a dict of float32 arrays by name, in PLSC's names and layout ("the files' layout" elsewhere):

    cls_token [1, 1, C]   reg_token [1, R, C]   pos_embed [1, positions, C]
    patch_embed.proj.weight [C, 3, p, p]  .bias
    blocks.N.norm1, .norm2; .attn.qkv [C, 3 C], .attn.proj; .mlp.fc1, .mlp.fc2; .ls1.gamma, .ls2.gamma
    norm   head0 (the tanh layer)   head         linear layers are [in, out]

Every other format is a table of names with what becomes of each array; the same table reads and writes. What a file
says of its model beyond its arrays' shapes, or what its program always does, stands in `ExternalWeights.model_hints` by the
names of the config's `model` section.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from vit_static.common.errors import WeightsError, format_value
from vit_static.common.io import write_atomically
from vit_static.config.schema import ModelConfig
from vit_static.weights.name_maps import (
    BIG_VISION,
    HF_DINOV2,
    HF_VIT,
    PLSC,
    PLSC_HINTS,
    TIMM,
    VIT_JAX,
    VIT_JAX_NOW,
    WITH_CLASS,
    Table,
)
from vit_static.weights.readers import read_arrays

State = dict[str, np.ndarray]
FormatName = Literal["plsc", "timm", "huggingface", "google"]


@dataclass(frozen=True)
class ExternalWeights:
    """What a file holds."""

    state: State
    format: str
    model_hints: dict[str, Any] = field(default_factory=dict)  # keys of the `model` section
    dropped: dict[str, str] = field(default_factory=dict)  # names in the file that the model has no use for, and why


def read_weights(path: Path) -> ExternalWeights:
    """A file of weights: Paddle's `.pdparams`, `.npz` of Google's programs, `.safetensors` of timm or Hugging Face.

    Raises WeightsError for what is none, or is of a model that this program hasn't. Never runs code from it.
    """
    kind, arrays = read_arrays(path)
    state = {name: array for name, array in arrays.items() if array is not None}
    if not state:
        raise WeightsError(f"{path}: holds no arrays of weights")
    found = _of_paddle(state, path) if kind == "paddle" else _from_names(state, path)
    others = {name: "holds no numbers with fractions" for name, array in arrays.items() if array is None}
    return ExternalWeights(found.state, found.format, found.model_hints, found.dropped | others)


def _of_paddle(state: State, path: Path) -> ExternalWeights:
    found = _translated(state, PLSC, path)
    first = found.state.get("blocks.0.mlp.fc1.weight")
    has_bias = "blocks.0.attn.qkv.bias" in found.state
    if first is not None and first.shape == (768, 2304) and not has_bias and len(PLSC.blocks_in(found.state)) == 8:
        raise WeightsError(
            f"{path}: is PaddleClas's ViT_small, which divides attention's scores by the root of its width where this "
            "model divides by that of a head's channels; take another of its models"
        )
    return found


def _from_names(state: State, path: Path) -> ExternalWeights:
    """A file whose program its names tell."""
    for ending, translate in (
        ("embedding/kernel", _from_google),
        ("embeddings.patch_embeddings.projection.weight", _from_huggingface),
        ("patch_embed.proj.weight", _from_timm),
    ):
        found = min((name for name in state if name.endswith(ending)), key=len, default=None)
        if found is not None:
            return translate(state, found.removesuffix(ending), path)
    shown = ", ".join(sorted(state)[:3]) or "none"
    raise WeightsError(f"{path}: is of no Vision Transformer that is known here; its arrays begin with {shown}")


def _from_timm(state: State, prefix: str, path: Path) -> ExternalWeights:
    return _translated(_below(state, prefix, path), TIMM, path)


def _below(state: State, prefix: str, path: Path) -> State:
    """Names without a prefix; those that haven't it stay."""
    found = {name.removeprefix(prefix): array for name, array in state.items()}
    if len(found) < len(state):
        raise WeightsError(
            f"{path}: has arrays of the same name with {prefix!r} before it and without; take one of them out"
        )
    return found


def _from_google(state: State, prefix: str, path: Path) -> ExternalWeights:
    given = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    outside = {name: "is not of the model" for name in state if not name.startswith(prefix)}
    given = _unscanned(given, path)
    counts_by_class = any("/MlpBlock_0/" in name for name in given)
    table = (VIT_JAX_NOW if WITH_CLASS in given else BIG_VISION) if counts_by_class else VIT_JAX
    found = _translated(given, table, path)
    for name, array in given.items():
        if name.endswith("/query/kernel") and array.ndim == 3:
            found.model_hints["num_heads"] = array.shape[1]
    return ExternalWeights(found.state, found.format, found.model_hints, found.dropped | outside)


_MAX_BLOCKS = 1000


def _unscanned(state: State, path: Path) -> State:
    """Blocks that big_vision keeps along an axis of each array (`scan`), each by itself."""
    scanned = "Transformer/encoderblock/"
    given = {name: array for name, array in state.items() if not name.startswith(scanned)}
    for name, array in state.items():
        if name.startswith(scanned) and array.ndim > 0:
            if len(array) > _MAX_BLOCKS:
                raise WeightsError(f"{path}: {name} is {list(array.shape)}, which is more blocks than any model has")
            for number, of_block in enumerate(array):
                given[f"Transformer/encoderblock_{number}/{name.removeprefix(scanned)}"] = of_block
    return given


def _from_huggingface(state: State, prefix: str, path: Path) -> ExternalWeights:
    given = _below(state, prefix, path)
    table = HF_DINOV2 if any(".layer_scale1." in name for name in given) else HF_VIT
    found = _translated(given, table, path)
    model_hints = found.model_hints | _hints_of_config(path.with_name("config.json"))
    return ExternalWeights(found.state, found.format, model_hints, found.dropped)


def _hints_of_config(path: Path) -> dict[str, Any]:
    """What Hugging Face's config.json beside the weights says that they don't."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    model_hints: dict[str, Any] = {}
    if isinstance(said, dict):
        for key, ours, kind, most in (
            ("num_attention_heads", "num_heads", int, 10_000),
            ("layer_norm_eps", "layer_norm_epsilon", float, 1.0),
        ):
            if type(said.get(key)) is kind:
                if not 0 < said[key] <= most:
                    raise WeightsError(f"{path}: {key} is {format_value(said[key])}, which no model has")
                model_hints[ours] = said[key]
        activation = said.get("hidden_act", "gelu")
        if activation in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
            model_hints["gelu"] = "tanh"
        elif activation not in ("gelu", "gelu_python"):
            raise WeightsError(f"{path}: hidden_act is {format_value(activation)}, and this model has GELU alone")
    return model_hints


def _translated(state: State, table: Table, path: Path) -> ExternalWeights:
    """Our names and layout. Raises WeightsError for an array that the table neither has nor explains."""
    names = table.for_blocks(table.blocks_in(state))
    own: State = {}
    dropped: dict[str, str] = {}
    unexpected = []
    for name, array in state.items():
        reason = next((why for pattern, why in table.refused.items() if re.fullmatch(pattern, name)), None)
        if reason is not None:
            raise WeightsError(f"{path}: {name}: {reason}")
        reason = next((why for pattern, why in table.ignored.items() if re.fullmatch(pattern, name)), None)
        if reason is not None:
            dropped[name] = reason
        elif name in names:
            own_name, change = names[name]
            if own_name in own:
                raise WeightsError(f"{path}: {name} and another of its arrays are both {own_name}")
            if ".attn.qkv." in own_name and (array.ndim == 0 or array.shape[0 if table is TIMM else -1] % 3):
                raise WeightsError(f"{path}: {name} is {list(array.shape)}, which is no query, key and value")
            try:
                own[own_name] = np.ascontiguousarray(change.to_own(array)) if array.ndim else array
                if own[own_name].ndim not in _num_axes(own_name) or not own[own_name].size:
                    raise IndexError
            except (ValueError, IndexError):
                raise WeightsError(
                    f"{path}: {name} has the shape {list(array.shape)}, which is no {own_name}"
                ) from None
        else:
            unexpected.append(name)
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise WeightsError(f"{path}: taken for {table.format}, but has {unexpected[0]}{more}, which these have not")
    try:
        return ExternalWeights(
            fuse_qkv(own), table.format, dict(table.model_hints) | _pooling(own, "fc_norm.weight" in state), dropped
        )
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: its queries, keys and values don't belong together ({error})") from None


def _num_axes(own_name: str) -> tuple[int, ...]:
    """How many axes an array may have. That LayerScale's fit is told where it is folded or set."""
    if own_name in ("pos_embed", "cls_token", "reg_token"):
        return (3,)
    if own_name == "patch_embed.proj.weight":
        return (4,)
    if own_name.endswith(".gamma"):
        return (0, 1, 2)
    is_vector = own_name.endswith(".bias") or "norm" in own_name
    return (1,) if is_vector else (2,)


def _pooling(state: State, has_norm_after: bool) -> dict[str, Any]:
    """What the head reads, as far as the arrays tell: with a class token timm's mean without a norm of its own looks
    as the class token's own head does."""
    reads = "cls" if "cls_token" in state else "gap"
    embedding, head = state.get("patch_embed.proj.weight"), state.get("head0.weight", state.get("head.weight"))
    if embedding is not None and head is not None and head.shape[:1] == (2 * embedding.shape[0],):
        reads = "cls_gap"
    return {"pool": "gap", "fc_norm": True} if has_norm_after else {"pool": reads}


def fuse_qkv(state: Mapping[str, np.ndarray]) -> State:
    """From the layers' names to the files': ``attn.{q,k,v}.*`` become ``attn.qkv.*``, side by side in that order."""
    fused = {}
    for name, value in state.items():
        if ".attn.q." in name:
            parts = [state[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"{name} is {list(parts[0].shape)}, and the others are not")
            fused[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate(parts, axis=-1)
        elif ".attn.k." not in name and ".attn.v." not in name:
            fused[name] = value
        elif name.replace(".attn.k.", ".attn.q.").replace(".attn.v.", ".attn.q.") not in state:
            raise KeyError(name)
    return fused


def split_qkv(state: Mapping[str, np.ndarray]) -> State:
    """From the files' names to the layers': the inverse of `fuse_qkv`."""
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
    """Writes a state in another program's format, beside Hugging Face's the config.json that it is read with.

    Raises WeightsError for a model that the other program hasn't.
    """
    table = _table_for(state, model, to)
    beside = path.with_name("config.json")
    if to == "huggingface" and beside.exists():
        raise WeightsError(f"{beside}: is there, and would be written over; name another folder")
    given = dict(state) if table is TIMM else split_qkv(state)
    numbers = PLSC.blocks_in(state)
    written: State = {}
    for theirs, (own_name, change) in table.for_blocks(numbers).items():
        if own_name in given and _is_its_norm(theirs, model):
            written[theirs] = np.ascontiguousarray(change.from_own(given.pop(own_name), num_heads))
    if given:
        raise WeightsError(f"{path}: {table.format} has no {next(iter(given))}")
    with write_atomically(path) as temporary:
        if to == "google":
            with temporary.open("wb") as file:
                np.savez(file, **written)  # type: ignore[arg-type]
        elif to == "timm":
            save_file(written, temporary, {"format": "pt"})
        else:
            kind = _huggingface_kind(state)
            if "reg_token" in state:  # from_pretrained wants one
                written["embeddings.mask_token"] = np.zeros_like(state["cls_token"][0])
            named = {k if k.startswith("classifier.") else f"{kind}.{k}": v for k, v in written.items()}
            save_file(named, temporary, {"format": "pt"})
    if to == "huggingface":
        # After the weights, which it says how to read.
        with write_atomically(beside) as temporary:
            content = json.dumps(_huggingface_config(state, model, num_heads), indent=2)
            temporary.write_text(content + "\n", encoding="utf-8")


def computed_otherwise(state: Mapping[str, np.ndarray], model: ModelConfig, to: FormatName) -> list[str]:
    """What the other program always does where this model doesn't, and its file can't say so."""
    model_hints = (
        PLSC_HINTS if to == "plsc" else {} if to == "huggingface" else _table_for(state, model, to).model_hints
    )
    return [
        f"{to} computes with model.{key}={model_hints[key]}, and this model with {getattr(model, key)}"
        for key in ("gelu", "layer_norm_epsilon")
        if key in model_hints and model_hints[key] != getattr(model, key)
    ]


def _is_its_norm(theirs: str, model: ModelConfig) -> bool:
    """Of timm's two names of the last norm the one that it has; every other name."""
    return not theirs.startswith(("norm.", "fc_norm.")) or theirs.startswith("fc_norm.") == model.fc_norm


def _table_for(state: Mapping[str, np.ndarray], model: ModelConfig, to: FormatName) -> Table:
    """Raises WeightsError where the other program would compute something else."""
    has_scale = "blocks.0.ls1.gamma" in state
    is_fixed = "pos_embed" not in state
    if is_fixed and to != "google":
        raise WeightsError(f"{to} keeps a position embedding in its file, and this model's is fixed: --format google")
    if to == "timm":
        if model.representation_size:
            raise WeightsError("timm's ViT has no representation layer before its head: --head drop")
        if model.pool == "cls_gap":
            raise WeightsError("timm's ViT reads the class token or the mean, and these weights both; --to huggingface")
        return TIMM
    if model.fc_norm:
        raise WeightsError(f"these weights' norm comes after the pooling, which {to} has not; timm has")
    if to == "google":
        if has_scale:
            raise WeightsError("Google's ViT has no LayerScale: fold it into the weights, --fold-layer-scale")
        if model.register_tokens or model.pool == "cls_gap":
            raise WeightsError(
                "Google's ViT has neither registers nor both poolings at once; --format timm or huggingface"
            )
        if model.pool == "gap" and model.has_class_token:
            raise WeightsError("Google's ViT has no class token beside a mean of the patches: --format timm")
        has_own_position = model.class_token_pos_embed or not model.has_class_token
        return BIG_VISION if is_fixed or not has_own_position else VIT_JAX
    if model.pool == "gap" or not model.has_class_token or not model.class_token_pos_embed:
        raise WeightsError("Hugging Face's ViT reads the class token, which has a position: --format timm")
    if (model.pool == "cls_gap") != has_scale or model.representation_size or (model.register_tokens and not has_scale):
        raise WeightsError(
            "Hugging Face has the ViT (class token) without LayerScale, and DINOv2 (both poolings) with it: "
            "--format timm, or --fold-layer-scale"
        )
    return HF_DINOV2 if has_scale else HF_VIT


def _huggingface_kind(state: Mapping[str, np.ndarray]) -> str:
    """Its model_type, which is also what its names begin with."""
    if "blocks.0.ls1.gamma" not in state:
        return "vit"
    return "dinov2_with_registers" if "reg_token" in state else "dinov2"


def _huggingface_config(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int) -> dict[str, Any]:
    kind = _huggingface_kind(state)
    width, mlp_dim = state["blocks.0.mlp.fc1.weight"].shape
    height, columns = model.image_size
    name = {"vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[kind]
    common = {
        "architectures": [f"{name}ForImageClassification"],
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": len(PLSC.blocks_in(state)),
        "num_attention_heads": num_heads,
        "patch_size": state["patch_embed.proj.weight"].shape[2],
        "image_size": height if height == columns else [height, columns],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "layer_norm_eps": model.layer_norm_epsilon,
        "hidden_act": "gelu" if model.gelu == "erf" else "gelu_pytorch_tanh",
    }
    if "head.bias" in state:
        common["id2label"] = {str(label): f"LABEL_{label}" for label in range(len(state["head.bias"]))}
    if kind == "vit":
        return {**common, "intermediate_size": mlp_dim}
    ratio = mlp_dim / width  # a whole number, by transformers 5
    own = {"mlp_ratio": int(ratio) if ratio.is_integer() else ratio, "use_swiglu_ffn": False}
    if kind == "dinov2":
        return {**common, **own, "use_mask_token": False}
    return {**common, **own, "num_register_tokens": state["reg_token"].shape[1]}

"""Writing of weights in other programs' formats."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from vit_static.common.errors import WeightsError
from vit_static.common.io import write_atomically, write_json
from vit_static.config.model_schema import ModelConfig
from vit_static.weights.formats import FormatName, detect_table
from vit_static.weights.model_record import RECORD_NAME, encode_record
from vit_static.weights.name_maps import NameMap
from vit_static.weights.rope_order import to_rope_order
from vit_static.weights.state import State, split_qkv
from vit_static.weights.tables.clip import HF_CLIP, OPEN_CLIP, TIMM_CLIP
from vit_static.weights.tables.dinov3 import HF_DINOV3, TIMM_DINOV3
from vit_static.weights.tables.eva import EVA02, EVA_FUSED, ROPE_AXIAL, ROPE_MIXED
from vit_static.weights.tables.google import BIG_VISION, VIT_JAX
from vit_static.weights.tables.huggingface import HF_DEIT, HF_DINOV2, HF_DINOV2_REGISTERS, HF_VIT
from vit_static.weights.tables.plsc import PLSC, PLSC_HINTS
from vit_static.weights.tables.siglip import HF_SIGLIP, HF_SIGLIP_CLASSIFIER, TIMM_SIGLIP
from vit_static.weights.tables.timm import TIMM

# The first that has the model is written.
_TABLES: dict[FormatName, tuple[NameMap, ...]] = {
    "timm": (TIMM, TIMM_DINOV3, EVA02, EVA_FUSED, ROPE_MIXED, ROPE_AXIAL, TIMM_CLIP, TIMM_SIGLIP),
    "huggingface": (
        HF_VIT,
        HF_DEIT,
        HF_DINOV2_REGISTERS,
        HF_DINOV2,
        HF_DINOV3,
        HF_CLIP,
        HF_SIGLIP,
        HF_SIGLIP_CLASSIFIER,
    ),
    "google": (VIT_JAX, BIG_VISION),
    "openclip": (OPEN_CLIP,),
}


def write_weights(
    state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int, path: Path, to: FormatName
) -> None:
    """Write a state in another program's format; for Hugging Face also the config.json next to it that it needs.

    Raises WeightsError if the other program doesn't have this model.
    """
    table = _table_for(state, model, to)
    describe = None if table.config_json is None else table.config_json.write
    config_path = path.with_name("config.json" if table.config_json is None else table.config_json.file_name)
    if describe is not None and config_path.exists():
        raise WeightsError(f"{config_path}: exists already, and would be overwritten; choose another folder")
    arrays = _convert(state, table, model, num_heads, path)
    named = {k if k.startswith(table.without_prefix) else f"{table.prefix}{k}": v for k, v in arrays.items()}
    if model.rope != "none":
        _require_same_order(table, named, to)
    record = encode_record(model)
    with write_atomically(path, sum(array.nbytes for array in arrays.values())) as temporary:
        if to == "google":
            named[RECORD_NAME] = np.frombuffer(record.encode(), np.uint8)  # which vit_jax ignores
            with temporary.open("wb") as file:
                np.savez(file, **named)  # type: ignore[arg-type]
        else:
            save_file(named, temporary, {"format": "pt", RECORD_NAME: record})
    if describe is not None:  # after the weights, so that a config.json always has its weights
        write_json(describe(state, model, num_heads), config_path)


def _require_same_order(table: NameMap, names: Collection[str], to: FormatName) -> None:
    """Raise WeightsError if the names of a file would be read as those of a program with another order of channels."""
    detected = detect_table(names)
    if detected is None or detected.names is not table.names or detected.rope_order != table.rope_order:
        raise WeightsError(
            f"{to}'s files of such a model have the names of another one, whose rotary positions differ; use --format "
            "plsc"
        )


def _convert(state: Mapping[str, np.ndarray], table: NameMap, model: ModelConfig, num_heads: int, path: Path) -> State:
    """Convert a state to the names and layout of a table. Raises WeightsError for an array that it has no name for."""
    state = to_rope_order(state, table.rope_order, num_heads)
    names = table.for_blocks(PLSC.blocks_in(state))
    wanted = {name for ours, _ in names.values() for name in ours}
    remaining = {name: value for name, value in state.items() if name in wanted}
    remaining |= split_qkv({name: value for name, value in state.items() if name not in wanted})
    arrays: State = {}
    for theirs, (ours, conversion) in names.items():
        if remaining.keys() >= set(ours) and _is_name_of_norm(theirs, model):
            parts = [remaining.pop(name) for name in ours]
            converted = conversion.to_theirs(parts if len(parts) > 1 else parts[0], num_heads)
            arrays[theirs] = np.ascontiguousarray(converted)
    if remaining:
        raise WeightsError(f"{path}: {table.format} has no {next(iter(remaining))}")
    return table.pack(arrays, num_heads)


def list_differences(state: Mapping[str, np.ndarray], model: ModelConfig, to: FormatName) -> list[str]:
    """Return one sentence for each thing that the other program computes differently, and its file can't say."""
    if to == "plsc":
        hints = PLSC_HINTS
    else:
        table = _table_for(state, model, to)
        is_described = table.config_json is not None and table.config_json.write is not None
        hints = {} if is_described else dict(table.model_hints)
    keys = ("gelu", "layer_norm_epsilon") if model.mlp == "gelu" else ("layer_norm_epsilon",)
    return [
        f"{to} computes with model.{key}={hints[key]}, and this model with {getattr(model, key)}"
        for key in keys
        if key in hints and hints[key] != getattr(model, key)
    ]


def _is_name_of_norm(theirs: str, model: ModelConfig) -> bool:
    """Tell, for timm's two names of the last norm, whether it is this model's; True for every other name."""
    return not theirs.startswith(("norm.", "fc_norm.")) or theirs.startswith("fc_norm.") == model.fc_norm


def _table_for(state: Mapping[str, np.ndarray], model: ModelConfig, to: FormatName) -> NameMap:
    """Return the table of a format. Raises WeightsError if none of its programs would compute the same."""
    lacking = [(table, table.lacks_option(model)) for table in _TABLES[to]]
    candidates = [table for table, key in lacking if key is None]
    reasons = [(table, table.refuses(state, model)) for table in candidates]
    for table, reason in reasons:
        if reason is None:
            return table
    if candidates:
        raise WeightsError(str(reasons[0][1]))
    key = lacking[0][1]
    raise WeightsError(
        f"model.{key} = {getattr(model, key or '')}: {to} has no such model, or this version doesn't write it; use "
        "--format plsc"
    )

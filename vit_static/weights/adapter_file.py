"""Adapters (LoRA) as a file of their own, in peft's layout: adapter_model.safetensors and adapter_config.json.

The names of the layers are timm's, so that peft loads the file for a plain ViT of timm. There queries, keys and values
are one layer: their adapters become one of up to three times the rank, whose B is zero outside of its own columns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from pydantic import TypeAdapter
from safetensors.numpy import save_file

from vit_static.checkpoint.progress import LoraBase
from vit_static.common.errors import WeightsError, truncate
from vit_static.common.io import write_atomically, write_json
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import Config, InitConfig, PosEmbedResampling
from vit_static.model.lora import A, B, is_adapter
from vit_static.weights.load import HEAD, adapt_state
from vit_static.weights.loaded import Weights
from vit_static.weights.model_record import RECORD_NAME, encode_record
from vit_static.weights.readers import read_arrays
from vit_static.weights.state import State, fuse_qkv

ADAPTER_FILE, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_BASE, _POS_EMBED = "vit_static_lora_base", "vit_static_pos_embed"  # keys of the metadata


@dataclass(frozen=True)
class AdapterFile:
    """Content of an adapter file: by a weight's name in the files' layout, what is added to it."""

    updates: Mapping[str, np.ndarray]  # float64
    trained: State  # the head, and what else isn't that of the frozen weights
    model: ModelConfig | None  # if this program wrote the file
    pos_embed: PosEmbedResampling
    base: LoraBase | None  # the same
    base_source: str  # where the frozen weights were

    def merged(self, base: Weights) -> State:
        """Return the weights in the files' layout, with the frozen ones from `base`. Raises WeightsError."""
        state = {name: value for name, value in base.state.items() if not name.startswith(HEAD)}
        if self.model is not None:
            init = InitConfig(head="reset", pos_embed=self.pos_embed)
            state, _ = adapt_state(base.external, self.model, str(base.source), init, base.grid)
        state |= self.trained
        for name, update in self.updates.items():
            if name not in state or state[name].shape != update.shape:
                shape = list(state[name].shape) if name in state else "none"
                raise WeightsError(
                    f"{base.source}: the adapters are of another model: {name} has the shape {shape} here, and "
                    f"{list(update.shape)} there"
                )
            state[name] = (state[name] + update).astype(np.float32)
        return state


def is_adapter_file(path: Path) -> bool:
    """Return whether a file holds adapters in peft's layout."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return any(name.endswith(_A) for name in file.keys())  # noqa: SIM118 - no iterator
    except (OSError, safetensors.SafetensorError):
        return False


def write_adapters(trained: State, config: Config, base: LoraBase, path: Path) -> None:
    """Write the adapters and the head of a LoRA run, by the layers' names, and adapter_config.json beside them."""
    lora = config.lora
    others = fuse_qkv({name: value for name, value in trained.items() if not is_adapter(name)})
    arrays = {name: value.T if value.ndim == 2 else value for name, value in others.items()}
    pairs = _fused_adapters(trained)
    for layer, (a, b) in pairs.items():
        arrays |= {f"{layer}{_A}": a.T, f"{layer}{_B}": b.T}
    ranks = {layer.split(".", 2)[-1]: a.shape[1] for layer, (a, _) in pairs.items()}
    larger = {layer: rank for layer, rank in ranks.items() if rank != lora.rank}
    metadata = {
        "format": "pt",
        RECORD_NAME: encode_record(config.model),
        _BASE: TypeAdapter(LoraBase).dump_json(base).decode(),
        _POS_EMBED: config.init.pos_embed,
    }
    with write_atomically(path, sum(array.nbytes for array in arrays.values())) as temporary:
        save_file({f"{_PREFIX}{k}": np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, metadata)
    adapter_config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base.source,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted({".".join(layer.split(".")[-2:]) for layer in pairs}),
        "rank_pattern": larger,
        "alpha_pattern": {layer: lora.alpha * rank / lora.rank for layer, rank in larger.items()},
        "modules_to_save": sorted({name.partition(".")[0] for name in others}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(adapter_config, path.with_name(_CONFIG))


def _fused_adapters(trained: State) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return A [inputs, rank] and B [rank, outputs] by layer, those of q, k and v as one of `attn.qkv`."""
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, a in trained.items():
        if not name.endswith(f".{A}"):
            continue
        layer = name.removesuffix(f".{A}")
        b = trained[f"{layer}.{B}"]
        part = re.fullmatch(r"(.*\.attn)\.([qkv])", layer)
        if part is None:
            pairs[layer] = a, b
            continue
        columns = [b if other == part[2] else np.zeros_like(b) for other in "qkv"]
        fused = f"{part[1]}.qkv"
        before = pairs.get(fused, (a[:, :0], np.zeros((0, 3 * b.shape[1]), b.dtype)))
        pairs[fused] = np.concatenate([before[0], a], 1), np.concatenate([before[1], np.concatenate(columns, 1)])
    return pairs


def read_adapter_file(path: Path) -> AdapterFile:
    """Read an adapter file of this program or of peft. Raises WeightsError if it is damaged or of another method."""
    content = read_arrays(path)
    settings = _read_settings(path.with_name(_CONFIG))
    arrays = {name.removeprefix(_PREFIX): array for name, array in content.arrays.items() if array is not None}
    updates, trained = {}, {}
    for name, array in arrays.items():
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            b = arrays.get(f"{layer}{_B}")
            if b is None or array.ndim != 2 or b.ndim != 2 or not array.shape[0] or b.shape[1] != array.shape[0]:
                raise WeightsError(f"{path}: the two matrices of {layer} don't belong together")
            scale = settings.alpha(layer) / array.shape[0]
            updates[f"{layer}.weight"] = scale * (array.T.astype(np.float64) @ b.T.astype(np.float64))
        elif not name.endswith(_B):
            trained[name] = np.ascontiguousarray(array.T) if array.ndim == 2 else array
    outside = [name for name in trained if content.model is None and not name.startswith(HEAD)]
    if outside:
        raise WeightsError(f"{path}: has {outside[0]}, and only adapters and the head are read from peft's files")
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
    try:
        base = TypeAdapter(LoraBase).validate_json(metadata[_BASE]) if _BASE in metadata else None
        pos_embed = TypeAdapter(PosEmbedResampling).validate_python(metadata.get(_POS_EMBED, "bicubic"))
    except ValueError as error:
        raise WeightsError(f"{path}: is damaged ({truncate(str(error))})") from None
    source = settings.base_source if base is None else base.source
    return AdapterFile(updates, trained, content.model, pos_embed, base, source)


@dataclass(frozen=True)
class _Settings:
    """What is needed of adapter_config.json."""

    lora_alpha: float
    alpha_pattern: Mapping[str, float]
    base_source: str

    def alpha(self, layer: str) -> float:
        """Return the factor of a layer's adapter, before the division by its rank."""
        for pattern, alpha in self.alpha_pattern.items():
            if layer == pattern or layer.endswith(f".{pattern}"):
                return alpha
        return self.lora_alpha


def _read_settings(path: Path) -> _Settings:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        alphas = {str(name): float(alpha) for name, alpha in (values.get("alpha_pattern") or {}).items()}
        settings = _Settings(float(values["lora_alpha"]), alphas, str(values.get("base_model_name_or_path") or ""))
        if not all(map(math.isfinite, (settings.lora_alpha, *alphas.values()))):
            raise ValueError("alpha is not finite")
    except FileNotFoundError:
        raise WeightsError(f"{path}: is missing; it belongs to the adapters beside it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path}: can't be read ({truncate(str(error))})") from None
    if values.get("peft_type") != "LORA":
        raise WeightsError(
            f"{path}: peft_type is {truncate(ascii(values.get('peft_type')))}, and only LORA is supported"
        )
    for key in ("use_dora", "use_rslora", "fan_in_fan_out"):
        if values.get(key):
            raise WeightsError(
                f"{path}: {key} is set, which this version doesn't support; merge the adapters with peft"
            )
    return settings

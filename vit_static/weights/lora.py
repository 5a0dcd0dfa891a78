"""Adapters (LoRA) and the frozen weights that they belong to: identifying these, finding them, and merging both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vit_static.checkpoint.progress import LoraBase
from vit_static.common.errors import WeightsError
from vit_static.config.schema import Config, InitConfig
from vit_static.model.lora import A, B, is_adapter
from vit_static.weights.load import HEAD, adapt_state
from vit_static.weights.loaded import Weights
from vit_static.weights.state import State, fuse_qkv, split_qkv


def fingerprint(state: Mapping[str, np.ndarray]) -> str:
    """Return what identifies weights: a SHA-256 digest of all arrays but the head's, whatever file they are in."""
    digest = hashlib.sha256()
    for name in sorted(name for name in state if not name.startswith(HEAD)):
        array = np.ascontiguousarray(state[name], "<f4")
        digest.update(f"{name} {list(array.shape)} ".encode())
        digest.update(array.data)
    return digest.hexdigest()


def lora_base(weights: Weights) -> LoraBase:
    """Return the record of the weights that a run's adapters belong to.

    Raises WeightsError for those of a LoRA run, whose merged weights another machine may round differently.
    """
    if weights.has_adapters:
        raise WeightsError(
            f"{weights.source}: are the weights of a run with LoRA; merge them into a file first "
            f"(./run.sh convert --from {weights.source} --to merged.pdparams), and set init.from to that"
        )
    return LoraBase(str(weights.source.resolve()), fingerprint(weights.state))


def require_base(weights: Weights, base: LoraBase, source: Path) -> None:
    """Raise WeightsError unless these are the weights that were recorded for the adapters in `source`."""
    if fingerprint(weights.state) != base.fingerprint:
        raise WeightsError(
            f"{weights.source}: are other weights than those that the adapters of {source} were trained on (which "
            f"were at {base.source}); restore them, or name their new place with -o init.from=PATH"
        )


def merge_lora(trained: State, base: Weights, config: Config) -> State:
    """Return the weights, in the files' layout, of a model whose LoRA run has `trained` these, by the layers' names.

    `config` is the run's. W + alpha / rank * A B is computed in float64.
    """
    init = InitConfig(head="reset", pos_embed=config.init.pos_embed)
    frozen, _ = adapt_state(base.external, config.model, str(base.source), init, base.grid)
    state = split_qkv(frozen) | {name: value for name, value in trained.items() if not is_adapter(name)}
    for name, matrix in trained.items():
        if name.endswith(f".{A}"):
            layer = name.removesuffix(f".{A}")
            update = matrix.astype(np.float64) @ trained[f"{layer}.{B}"].astype(np.float64)
            state[f"{layer}.weight"] = (state[f"{layer}.weight"] + config.lora.scale * update).astype(np.float32)
    return fuse_qkv(state)

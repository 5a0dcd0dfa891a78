"""Find and read weights: a run, a checkpoint or a file of any format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vit_static.checkpoint.folder import (
    CLASS_NAMES,
    CONFIG,
    MANIFEST,
    MERGED,
    MERGED_AVERAGE,
    META,
    latest_checkpoint,
    open_shards,
)
from vit_static.checkpoint.resume import suggest_fallback, verify_files
from vit_static.common.errors import ConfigError, WeightsError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.model.variants import grid_of, variant_of
from vit_static.optim.optimizers import EMA
from vit_static.weights.formats import ExternalWeights, State, fuse_qkv, read_weights


@dataclass(frozen=True)
class Weights:
    """What a file or a checkpoint holds, and the config that it was trained with, where it is known."""

    found: ExternalWeights
    config: Config | None
    class_names: list[str] | None
    source: Path

    @property
    def state(self) -> State:
        return self.found.state

    @property
    def grid(self) -> tuple[int, int] | None:
        """Of the patches that the weights were trained on."""
        return None if self.config is None else grid_of(self.config.model)

    def config_with(self, overrides: Iterable[str]) -> Config:
        """The config with ``section.key=value`` overrides. Raises ConfigError where none lies beside the weights."""
        if self.config is None:
            raise ConfigError(f"{self.source}: has no {CONFIG} beside it; name the run's config with -c")
        return load_config(self.source.parent / CONFIG if self.source.is_file() else self.source / CONFIG, overrides)


def load_weights(path: Path, *, averaged: bool = False) -> Weights:
    """Weights from a run's folder (its merged weights, or else its latest checkpoint), a checkpoint, or a file of any
    format that `formats.read` knows. `averaged`: of a run or checkpoint of ours the moving average.

    Raises WeightsError where there are none.
    """
    if path.is_file():
        beside = path.parent / CONFIG
        config = load_config(beside) if beside.is_file() else None
        found = read_weights(path)
        if config is not None:
            found = replace(found, model_hints=_model_hints(config))
        return Weights(found, config, _read_class_names(path.parent), path)
    merged = path / (MERGED_AVERAGE if averaged else MERGED)
    if merged.is_file():
        return load_weights(merged)
    if (path / MANIFEST).is_file() or (path / META).is_file():
        try:
            verify_files(path)
        except WeightsError as error:
            raise WeightsError(f"{error}; {suggest_fallback(path)}") from None
        config = load_config(path / CONFIG)
        if averaged and config.optim.ema_decay == 0.0:
            raise WeightsError(f"{path}: has no moving average of the weights (optim.ema_decay is 0)")
        found = ExternalWeights(
            merge_shards(path, averaged=averaged), "this program's checkpoint", _model_hints(config)
        )
        return Weights(found, config, _read_class_names(path), path)
    newest = latest_checkpoint(path)
    if newest is not None:
        return load_weights(newest, averaged=averaged)
    raise WeightsError(
        f"{path}: {'holds no weights' if path.is_dir() else 'no such file or folder'}; train first "
        "('./run.sh pretrain' makes output/quickstart), or name a run's folder, "
        "a checkpoint (checkpoints/step_*) or a file of weights (.pdparams, .npz, .safetensors)"
    )


def _model_hints(config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "num_heads": variant_of(model).num_heads,
        "class_token_pos_embed": model.class_token_pos_embed,
        **{key: getattr(model, key) for key in ("gelu", "layer_norm_epsilon", "pool", "fc_norm")},
    }


def _read_class_names(folder_path: Path) -> list[str] | None:
    path = folder_path / CLASS_NAMES
    try:
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else None
    except UnicodeDecodeError:
        raise WeightsError(f"{path}: is not UTF-8 text; write it anew, a line a class, or take it away") from None


def merge_shards(path: Path, *, averaged: bool = False) -> State:
    """A sharded checkpoint's weights, or their moving average, whole, in the files' layout."""
    parts = open_shards(path)
    # Of what is frozen there is no average: it is the same.
    wanted = {name: f"{name}@{EMA}" if averaged and f"{name}@{EMA}" in parts else name for name in parts}
    return fuse_qkv({name: parts.read(held) for name, held in wanted.items() if "@" not in name})

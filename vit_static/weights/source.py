"""Sources of weights: a run, a checkpoint or a file of any format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from vit_static.checkpoint.folder import (
    CLASS_NAMES,
    CONFIG,
    MERGED,
    MERGED_AVERAGE,
    MERGED_BEST,
    MERGED_BEST_AVERAGE,
    best_checkpoint,
    is_checkpoint,
    latest_checkpoint,
    open_shards,
)
from vit_static.checkpoint.progress import LoraBase
from vit_static.checkpoint.resume import read_lora_base, read_progress, suggest_fallback, verify_files
from vit_static.common.errors import ConfigError, WeightsError
from vit_static.common.text import display_name, read_lines
from vit_static.config.data_schema import SelectionMetric
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.model.teacher import PROJECTOR
from vit_static.model.variants import variant_of
from vit_static.optim.ema import EMA
from vit_static.optim.schedule_free import OFFSET, averaged_weights
from vit_static.report.metric_names import METRIC_TITLES, format_metric
from vit_static.weights.adapter_file import ADAPTER_FILE, is_adapter_file, read_adapter_file
from vit_static.weights.formats import ExternalWeights, read_weights
from vit_static.weights.infer import shape_of_weights, with_shape
from vit_static.weights.loaded import Weights
from vit_static.weights.lora import merge_lora, require_base
from vit_static.weights.state import State, fuse_qkv

WhichWeights = Literal["best", "last"]


def load_weights(
    path: Path, *, ema: bool = False, which: WhichWeights = "last", overrides: Iterable[str] = ()
) -> Weights:
    """Load weights from a run's folder, a checkpoint, or a file of any format that formats.py knows.

    A run's folder stands for its last weights: the merged ones if it has them, else those of its latest checkpoint.
    With `which` = "best" it stands for its best result by eval.metric (`best_weights`). `ema` selects the moving
    average. The weights of a run with LoRA are merged; `overrides` of its config may say where the frozen ones are now
    (init.from). Raises WeightsError if there are no weights, or no average of them.
    """
    if which == "best":
        path = best_weights(path, ema=ema)
    if (path / ADAPTER_FILE).is_file():
        path = path / ADAPTER_FILE
    if is_adapter_file(path):
        return _load_adapter_file(path, overrides)
    if path.is_file():
        config_path = path.parent / CONFIG
        config = load_config(config_path) if config_path.is_file() else None
        external = read_weights(path, ema=ema and path.name not in (MERGED_AVERAGE, MERGED_BEST_AVERAGE))
        if config is not None:
            external = replace(external, model_hints=_model_hints(config))
        return Weights(external, config, _read_class_names(path.parent), path)
    merged = path / (MERGED_AVERAGE if ema else MERGED)
    if merged.is_file():
        return load_weights(merged)
    checkpoint = path if is_checkpoint(path) else latest_checkpoint(path)
    if checkpoint is not None:
        return _load_checkpoint(checkpoint, overrides, ema=ema)
    raise _no_weights(path)


def require_weights(path: Path) -> None:
    """Raise WeightsError if there are no weights that `load_weights` would load; their content isn't read."""
    if not _has_weights(path):
        raise _no_weights(path)


def _has_weights(path: Path) -> bool:
    has_file = path.is_file() or any((path / name).is_file() for name in (MERGED, ADAPTER_FILE))
    return has_file or is_checkpoint(path) or latest_checkpoint(path) is not None


def _no_weights(path: Path) -> WeightsError:
    if any(file for pattern in ("*.pdiparams", "*.onnx") for file in path.glob(pattern)):
        return WeightsError(
            f"{path}: is an exported model, for predict and serve; name the run, the checkpoint or the file of weights "
            "that it was exported from"
        )
    return WeightsError(
        f"{path}: {'holds no weights' if path.is_dir() else 'no such file or folder'}; train first "
        "('./run.sh pretrain' makes output/quickstart), or name a run's folder, "
        "a checkpoint (checkpoints/step_*) or a file of weights (.pdparams, .npz, .safetensors)"
    )


def best_weights(path: Path, *, ema: bool = False) -> Path:
    """Return where the best weights of a run's folder are: a merged file if it has one, else a checkpoint.

    Any other path is returned as it is, and so is that of a run without a best checkpoint.
    """
    merged, best = path / (MERGED_BEST_AVERAGE if ema else MERGED_BEST), best_checkpoint(path)
    if merged.is_file():
        return merged
    if best is None or best == latest_checkpoint(path.resolve()):
        return path
    return best


def describe_choice(path: Path, which: WhichWeights) -> str | None:
    """Return which weights a run's folder stands for; None for any other path, and for a run without evaluations."""
    best, newest = best_checkpoint(path), latest_checkpoint(path)
    if is_checkpoint(path) or best is None or newest is None:
        return None
    progress, _ = read_progress(newest)
    if progress.best_value is None or progress.best_step is None:
        return None
    metric: SelectionMetric = progress.metric  # type: ignore[assignment]
    result = f"{METRIC_TITLES[metric]} {format_metric(metric, progress.best_value)} at step {progress.best_step}"
    if progress.best_step == progress.step:
        return f"{path}: the weights of step {progress.step}, the last and the best ({result})"
    if which == "best":
        return f"{path}: the best weights, {result}; --weights last selects those of step {progress.step}"
    return f"{path}: the last weights, of step {progress.step}; --weights best selects the best, {result}"


def _load_checkpoint(path: Path, overrides: Iterable[str], *, ema: bool) -> Weights:
    try:
        verify_files(path)
    except WeightsError as error:
        raise WeightsError(f"{error}; {suggest_fallback(path)}") from None
    config = load_config(path / CONFIG)
    if ema and config.optim.ema_decay == 0.0:
        raise WeightsError(f"{path}: has no moving average of the weights (optim.ema_decay is 0)")
    has_adapters = config.lora.rank > 0
    if has_adapters:
        given = load_config(path / CONFIG, [text for text in overrides if text.startswith("init.from=")]).init.from_
        state = merge_lora(read_shards(path, ema=ema), load_lora_base(path, given), config)
    else:
        state = merge_shards(path, ema=ema)
    external = ExternalWeights(state, "this program's checkpoint", _model_hints(config))
    return Weights(external, config, _read_class_names(path), path, has_adapters)


def _model_hints(config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "num_heads": variant_of(model).num_heads,
        "class_token_pos_embed": model.class_token_pos_embed,
        **{key: getattr(model, key) for key in ("gelu", "layer_norm_epsilon", "pool", "fc_norm", "pos_embed")},
        **{key: getattr(model, key) for key in ("rope", "rope_base", "rope_grid", "rope_register_base")},
    }


def _read_class_names(folder: Path) -> list[str] | None:
    path = folder / CLASS_NAMES
    try:
        return list(map(display_name, read_lines(path))) if path.is_file() else None
    except ValueError:
        raise WeightsError(
            f"{path}: is not UTF-8 text; replace it, with one class name per line, or remove it"
        ) from None


def _load_adapter_file(path: Path, overrides: Iterable[str]) -> Weights:
    """Load adapters in peft's layout, merged with the frozen weights that they name, or that init.from names."""
    adapters = read_adapter_file(path)
    given = [text.partition("=")[2] for text in overrides if text.startswith("init.from=")]
    source = given[-1] if given else adapters.base_source
    place = Path(source)
    if not source or not _has_weights(place):
        where = f"the weights that they belong to are not at {place}" if source else "they don't say where"
        raise WeightsError(
            f"{path}: has only adapters of other weights, and {where}; name their place with -o init.from=PATH"
        )
    base = load_weights(place)
    if adapters.base is not None:
        require_base(base, adapters.base, path)
    hints = base.external.model_hints
    name = f"adapters in peft's layout, merged with {base.external.format}"
    external = ExternalWeights(adapters.merged(base), name, hints, model=adapters.model)
    config = load_config(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else None
    return Weights(external, config, _read_class_names(path.parent), path, has_adapters=True)


def load_adapters(path: Path, *, ema: bool = False) -> tuple[State, Config, LoraBase]:
    """Load what a LoRA run has trained, by the layers' names, its config, and what its frozen weights are.

    `path`: a run's folder or a checkpoint. Raises WeightsError for anything else.
    """
    checkpoint = path if is_checkpoint(path) else latest_checkpoint(path)
    config = None if checkpoint is None else load_config(checkpoint / CONFIG)
    if checkpoint is None or config is None or config.lora.rank == 0:
        raise WeightsError(f"{path}: is no run with LoRA, nor a checkpoint of one, so it has no adapters")
    verify_files(checkpoint)
    return read_shards(checkpoint, ema=ema), config, read_lora_base(checkpoint)


def find_lora_base(checkpoint: Path, given: str | None) -> Path:
    """Return where the frozen weights of a LoRA run's checkpoint are.

    That is `given`, init.from as it is set now, if it isn't what it was in the run. Otherwise it is the recorded file
    or, if that is gone, init.from. Raises WeightsError if there is nothing.
    """
    saved, base = load_config(checkpoint / CONFIG).init.from_, read_lora_base(checkpoint)
    if given is not None and given != saved:
        require_weights(Path(given))
        return Path(given)
    for place in (base.source, saved):
        if place is not None and _has_weights(Path(place)):
            return Path(place)
    raise WeightsError(
        f"{checkpoint}: has only the adapters and the head, and the weights that they belong to are no longer at "
        f"{base.source}; restore them, or name their new place with -o init.from=PATH"
    )


def load_lora_base(checkpoint: Path, given: str | None) -> Weights:
    """Load the frozen weights of a LoRA run's checkpoint, from where `find_lora_base` finds them.

    Raises WeightsError if they are missing or have changed.
    """
    weights = load_weights(find_lora_base(checkpoint, given))
    require_base(weights, read_lora_base(checkpoint), checkpoint)
    return weights


def merge_shards(path: Path, *, ema: bool = False) -> State:
    """Return a checkpoint's full weights as `read_shards`, in the files' layout (formats.py)."""
    return fuse_qkv(read_shards(path, ema=ema))


def read_shards(path: Path, *, ema: bool = False) -> State:
    """Return the weights in a checkpoint, or with `ema` their moving average, by the layers' names.

    The weights of schedule_free_adamw are its average.
    """
    shards = open_shards(path)
    # Frozen parameters have no average of their own: it would be the same.
    names = {
        name: f"{name}@{EMA}" if ema and f"{name}@{EMA}" in shards else name
        for name in shards
        if not name.startswith(f"{PROJECTOR}.")
    }
    state = {name: shards.read(saved_name) for name, saved_name in names.items() if "@" not in name}
    averaged = [name for name in state if f"{name}@{OFFSET}" in shards]
    if averaged:
        beta1 = load_config(path / CONFIG).optim.betas[0]
        state |= {name: averaged_weights(state[name], shards.read(f"{name}@{OFFSET}"), beta1) for name in averaged}
    return state


def with_model_of_init(config: Config) -> Config:
    """Return the config with the model's shape from the weights of init.from, if it has ``model.from: init``.

    Raises ConfigError or WeightsError as `with_shape` and `load_weights` do.
    """
    if config.model.from_ == "config":
        return config
    if config.init.from_ is None:
        raise ConfigError("model.from = 'init': there are no weights to take the shape from; set init.from")
    weights = load_weights(Path(config.init.from_))
    return with_shape(config, shape_of_weights(weights), str(weights.source), with_head=config.init.head == "keep")

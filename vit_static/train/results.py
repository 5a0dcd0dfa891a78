"""A run's results at its end: the merged weights, of the last step and of the best one, and the lines about them."""

from __future__ import annotations

from pathlib import Path

from vit_static.checkpoint.folder import (
    CONFIG,
    MERGED,
    MERGED_AVERAGE,
    MERGED_BEST,
    MERGED_BEST_AVERAGE,
    checkpoint_dir,
)
from vit_static.checkpoint.progress import Progress, improves
from vit_static.common.text import counted
from vit_static.config.loader import load_config
from vit_static.report.metric_names import METRIC_TITLES, format_metric
from vit_static.train.notes import late_average
from vit_static.train.run_spec import RunSpec
from vit_static.weights.load import write_pdparams
from vit_static.weights.source import merge_shards


def merge_weights(run_dir: Path, progress: Progress, *, has_ema: bool) -> None:
    """Write the weights of the last checkpoint as one file, and those of the best one if that is an earlier one.

    With `has_ema` also their moving averages. Files of an earlier best are removed.
    """
    last = checkpoint_dir(run_dir, progress.step)
    best = None if progress.best_step is None else checkpoint_dir(run_dir, progress.best_step)
    _merge(last, run_dir / MERGED, run_dir / MERGED_AVERAGE, has_ema=has_ema)
    if best is not None and best != last and best.is_dir():
        _merge(best, run_dir / MERGED_BEST, run_dir / MERGED_BEST_AVERAGE, has_ema=has_ema)
    else:
        for name in (MERGED_BEST, MERGED_BEST_AVERAGE):
            (run_dir / name).unlink(missing_ok=True)


def _merge(checkpoint: Path, path: Path, average_path: Path, *, has_ema: bool) -> None:
    model = load_config(checkpoint / CONFIG).model
    write_pdparams(merge_shards(checkpoint), path, model)
    if has_ema:
        write_pdparams(merge_shards(checkpoint, ema=True), average_path, model)


def describe_results(spec: RunSpec, progress: Progress, weights_value: float | None = None) -> str:
    """Return the last and the best result, and which file has the weights of which; with LoRA, which checkpoint.

    With a moving average they are its results and files, followed by `weights_value`, eval.metric of the last weights
    themselves if it is known, and by why the average is worse if it can't have caught up.
    """
    results = _describe_results(spec, progress)
    if weights_value is None or spec.config.optim.ema_decay == 0.0:
        return results
    run_dir, metric = spec.config.run_dir, spec.config.selection_metric
    where = checkpoint_dir(run_dir, progress.step) if spec.config.lora.rank > 0 else run_dir / MERGED
    text = (
        f"moving average: {results}; last weights themselves: {METRIC_TITLES[metric]} "
        f"{format_metric(metric, weights_value)} ({where}); other verbs use these, or the average with --ema"
    )
    is_average_worse = improves(metric, weights_value, progress.last_value)
    hint = late_average(spec.config, progress.step) if is_average_worse else None
    return text if hint is None else f"{text}\nthe average has not caught up with the weights: {hint}"


def _describe_results(spec: RunSpec, progress: Progress) -> str:
    run_dir, metric = spec.config.run_dir, spec.config.selection_metric
    has_ema, has_adapters = spec.config.optim.ema_decay > 0.0, spec.config.lora.rank > 0
    title, value = METRIC_TITLES[metric], progress.last_value
    last_file = run_dir / (MERGED_AVERAGE if has_ema else MERGED)
    if has_adapters:
        last_file = checkpoint_dir(run_dir, progress.step)
    if progress.metric != metric or progress.evaluated_step != progress.step or value is None:
        result = f"last {title} not evaluated ({last_file})"
    elif progress.best_step == progress.step:
        return f"{title} {format_metric(metric, value)}, the best of this run; weights in {last_file}"
    else:
        result = f"last {title} {format_metric(metric, value)} ({last_file})"
    if progress.metric != metric or progress.best_value is None or progress.best_step is None:
        return result
    best_file = run_dir / (MERGED_BEST_AVERAGE if has_ema else MERGED_BEST)
    if has_adapters:
        best_file = checkpoint_dir(run_dir, progress.best_step)
    where = str(best_file) if best_file.exists() else "its checkpoint is no longer there"
    epoch = spec.epoch(progress.best_step)
    return f"{result}; best {title} {format_metric(metric, progress.best_value)} at epoch {epoch:.4g} ({where})"


def describe_early_stop(spec: RunSpec, progress: Progress) -> str:
    """Return why the run ends before its schedule."""
    metric, reference = spec.config.selection_metric, progress.reference_value
    title, min_delta = METRIC_TITLES[metric], spec.config.train.min_delta
    gained = "has not improved" if min_delta == 0.0 else f"has not improved by more than {min_delta:g}"
    past = "a finite value" if reference is None else format_metric(metric, reference)
    return (
        f"stopped early after epoch {spec.epoch(progress.step):.4g}: {title} {gained} on {past} in "
        f"{counted(progress.num_stale_evals, 'evaluation')} (train.patience = {spec.config.train.patience}); to train "
        "on, set a larger train.patience, or null"
    )

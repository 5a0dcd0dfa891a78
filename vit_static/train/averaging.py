"""Averages of the weights of several checkpoints or runs: the uniform one, and a greedy soup (the verb `average`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.checkpoint.folder import (
    CLASS_NAMES,
    CONFIG,
    MERGED,
    is_checkpoint,
    latest_checkpoint,
    numbered_checkpoints,
    write_class_names,
)
from vit_static.common.errors import UserError, WeightsError
from vit_static.common.io import write_json
from vit_static.common.text import counted, print_line
from vit_static.config.data_schema import SelectionMetric
from vit_static.config.loader import dump_config
from vit_static.config.lora_schema import LoraConfig
from vit_static.config.schema import Config
from vit_static.data.open_set import open_set
from vit_static.parallel.mesh import MeshShape, rank_and_world_size, start_mesh
from vit_static.report.metric_names import METRIC_TITLES, format_metric
from vit_static.train.evaluate import EvalMetrics, eval_loader, load_program, predict_all
from vit_static.weights.convert import SUFFIXES
from vit_static.weights.infer import config_for
from vit_static.weights.load import write_pdparams
from vit_static.weights.loaded import Weights
from vit_static.weights.source import load_weights, require_weights
from vit_static.weights.state import State

REPORT = "average.json"
MAX_LAST = 5  # checkpoints of a run, unless --last sets another number


@dataclass(frozen=True)
class Soup:
    """A greedy soup: the positions of its ingredients, and their results by position, in the order they were tried."""

    chosen: list[int]
    results: dict[int, float]  # of each candidate by itself
    value: float  # of the soup


def average_runs(
    config: Config | None,
    runs: Sequence[Path],
    overrides: list[str],
    *,
    last: int | None = None,
    greedy: bool = False,
    ema: bool = False,
    out: Path | None = None,
) -> None:
    """Average weights and write them to a folder that other verbs take for a run's.

    `runs`: folders of runs, checkpoints or files. Of a run they are those of its `last` checkpoints (None: of a single
    run at most MAX_LAST, of several the latest of each). `ema`: their moving averages. `greedy`: only those that
    improve the average's result by eval.metric on the validation images. `out` None: NAME_average beside the first run.
    Raises WeightsError for weights of different models.
    """
    out = out or _default_folder(runs[0])
    if out.suffix in SUFFIXES:
        raise UserError(
            f"--out {out}: an average is a folder of weights, config and class names; name a folder, such as "
            f"{out.with_suffix('')}, and './run.sh convert --from {out.with_suffix('')} --to {out}' writes one file"
        )
    if (out / "checkpoints").exists() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out}: is a run or a file; name another folder")
    for run in runs:
        require_weights(run)
    sources = [source for run in runs for source in _sources(run, last, is_single=len(runs) == 1)]
    if len(sources) < 2:
        raise UserError(
            f"{runs[0]}: has one set of weights, and an average needs two; name several runs, or train with "
            f"-o checkpoint.keep_last={MAX_LAST}"
        )
    first = load_weights(sources[0], ema=ema, overrides=overrides)
    config = config_for(config, first, overrides)
    for source in sources[1:]:
        require_same_model(load_weights(source, ema=ema, overrides=overrides), first)

    def states(positions: Iterable[int]) -> Iterable[State]:
        return (load_weights(sources[position], ema=ema, overrides=overrides).state for position in positions)

    is_writer = rank_and_world_size()[0] == 0
    positions, soup = list(range(len(sources))), None
    if greedy:
        metric = config.selection_metric
        soup = greedy_soup(len(sources), _evaluation(config, first, states), metric)
        positions = soup.chosen
        if is_writer:
            _print_soup(soup, sources, metric)
    if is_writer:
        out.mkdir(parents=True, exist_ok=True)
        write_pdparams(mean_state(states(positions)), out / MERGED, config.model)
        dump_config(config.model_copy(update={"lora": LoraConfig()}), out / CONFIG)  # adapters are merged
        if first.class_names is not None:
            write_class_names(out, first.class_names)
        write_json(_report(sources, positions, config.selection_metric, soup), out / REPORT)
        print_line(
            f"averaged {counted(len(positions), 'set')} of weights of {len(sources)}: {out / MERGED}; "
            f"'./run.sh eval --checkpoint {out}' evaluates the average"
        )


def _default_folder(run: Path) -> Path:
    named = run if run.name not in ("", "..") else run.resolve()
    return named.with_name(f"{named.name.removesuffix('.pdparams')}_average")


def _sources(run: Path, last: int | None, *, is_single: bool) -> list[Path]:
    """Return the checkpoints of a run that are averaged, or the path of other weights itself."""
    if run.is_file() or is_checkpoint(run) or latest_checkpoint(run) is None:
        return [run]
    checkpoints = [path for _, path in numbered_checkpoints(run / "checkpoints")]
    if last is not None and len(checkpoints) < last:
        raise UserError(
            f"--last {last}: {run} has {counted(len(checkpoints), 'checkpoint')}; use a smaller number, or train with "
            f"-o checkpoint.keep_last={last}"
        )
    return checkpoints[-(last or (MAX_LAST if is_single else 1)) :]


def require_same_model(weights: Weights, first: Weights) -> None:
    """Raise WeightsError, which names the first difference, unless two sets of weights are of one model and classes."""
    problem = None
    hints, first_hints = weights.external.model_hints, first.external.model_hints
    for key in sorted(hints.keys() & first_hints.keys()):
        if problem is None and hints[key] != first_hints[key]:
            problem = f"has model.{key} = {hints[key]!r}, and {first.source} has {first_hints[key]!r}"
    shapes, first_shapes = ({name: value.shape for name, value in each.state.items()} for each in (weights, first))
    if problem is None and shapes != first_shapes:
        name = min(name for name, _ in shapes.items() ^ first_shapes.items())
        problem = (
            f"{name} has the shape {_shape(shapes.get(name))}, and {_shape(first_shapes.get(name))} in {first.source}"
        )
    if problem is None and weights.class_names != first.class_names:
        problem = f"has other classes than {first.source} ({CLASS_NAMES})"
    if problem is not None:
        raise WeightsError(f"{weights.source}: {problem}; only weights of the same model can be averaged")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def mean_state(states: Iterable[State]) -> State:
    """Return the mean of states with the same arrays, computed in float64 with one of them at a time in memory."""
    total: dict[str, np.ndarray] = {}
    number = 0
    for state in states:
        number += 1
        for name, value in state.items():
            total[name] = total.get(name, 0.0) + value.astype(np.float64)
    return {name: (value / number).astype(np.float32) for name, value in total.items()}


def greedy_soup(num_candidates: int, evaluate: Callable[[Sequence[int]], float], metric: SelectionMetric) -> Soup:
    """Choose which candidates to average (arXiv 2203.05482, algorithm 1).

    `evaluate` returns the value of `metric` of the mean of candidates. They are tried from the best to the worst, and
    each one stays whose mean with those before it isn't worse.
    """
    sign = -1.0 if metric == "loss" else 1.0
    results = {position: evaluate([position]) for position in range(num_candidates)}
    order = sorted(results, key=lambda position: sign * _finite(results[position], sign), reverse=True)
    chosen, value = order[:1], results[order[0]]
    for position in order[1:]:
        with_candidate = evaluate([*chosen, position])
        if sign * (with_candidate - value) >= 0.0:  # false for NaN
            chosen, value = [*chosen, position], with_candidate
    return Soup(chosen, {position: results[position] for position in order}, value)


def _finite(value: float, sign: float) -> float:
    """Return the value, or the worst one in place of NaN."""
    return value if np.isfinite(value) else -sign * float("inf")


def _evaluation(
    config: Config, first: Weights, states: Callable[[Iterable[int]], Iterable[State]]
) -> Callable[[Sequence[int]], float]:
    """Return a function from positions of candidates to the result of their mean, by eval.metric on the images."""
    shape = MeshShape(dp=rank_and_world_size()[1], mp=1, pp=1)
    mesh = start_mesh(shape, config.device, config.parallel.collective_timeout_s)
    images = open_set(config.data, "val", config.model.num_classes)
    program = load_program(config, first, mesh, returns_logits=config.evaluates_logits)
    loader = eval_loader(config, images, mesh)

    def evaluate(positions: Sequence[int]) -> float:
        program.set_weights(mean_state(states(positions)))
        metrics = EvalMetrics.of(predict_all(program, loader, mesh), config.eval.threshold)
        return metrics.value_of(config.selection_metric)

    return evaluate


def _print_soup(soup: Soup, sources: Sequence[Path], metric: SelectionMetric) -> None:
    for position, value in soup.results.items():
        fate = "in the soup" if position in soup.chosen else "left out"
        print_line(f"{sources[position]}: {METRIC_TITLES[metric]} {format_metric(metric, value)}, {fate}")
    print_line(f"greedy soup: {METRIC_TITLES[metric]} {format_metric(metric, soup.value)}")


def _report(
    sources: Sequence[Path], positions: Sequence[int], metric: SelectionMetric, soup: Soup | None
) -> dict[str, Any]:
    """Return the content of average.json."""
    averaged = [str(sources[position]) for position in positions]
    if soup is None:
        return {"averaged": averaged}
    candidates = [{"weights": str(sources[position]), metric: value} for position, value in soup.results.items()]
    return {"averaged": averaged, "metric": metric, "value": soup.value, "candidates": candidates}

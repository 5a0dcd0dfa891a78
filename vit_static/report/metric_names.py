"""Names and units of the metrics that can select a run's best checkpoint (eval.metric)."""

from __future__ import annotations

from vit_static.config.data_schema import SelectionMetric

METRIC_TITLES: dict[SelectionMetric, str] = {
    "top1": "top-1",
    "map": "mAP",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced accuracy",
    "loss": "loss",
}


def metric_unit(metric: SelectionMetric) -> str:
    """Return the unit of a metric's values: per cent, or none for the loss."""
    return "" if metric == "loss" else "%"


def format_metric(metric: SelectionMetric, value: float) -> str:
    """Return a value with its unit, such as 99.15 % or, of the loss, 0.0312."""
    return f"{value:.4f}" if metric == "loss" else f"{value:.2f} %"

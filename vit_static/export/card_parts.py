"""Parts of a model card: Hugging Face's header, the training recipe, and the metrics by class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vit_static.config.schema import Config
from vit_static.config.section import Section
from vit_static.inference.artifact import Comparison, ModelSpec
from vit_static.inference.probabilities import to_probabilities
from vit_static.report.class_metrics import ClassCounts

_MAX_CLASSES = 100  # in the table; of more classes, those with the lowest F1
_MIN_SUPPORT = 20  # images of a class, below which its metrics say little
# Keys that a recipe names in any case, and sections whose other keys it names if they differ from the defaults
_ALWAYS = (
    *("train.epochs", "data.global_batch_size", "optim.name", "optim.lr", "optim.weight_decay", "schedule.name"),
    *("schedule.warmup_steps", "seed"),
)
_SECTIONS = ("model", "data", "augment", "loss", "optim", "schedule", "train", "amp", "init")
_NOT_RECIPE = (  # said elsewhere in the card, or without influence on the weights
    *("data.root", "data.num_threads", "model.variant", "model.num_classes", "train.profile_steps"),
    *("train.max_restarts", "train.stop_timeout_s", "train.node_timeout_s"),
)


class ClassTally:
    """Counts by class of the exported model's predictions for the validation images."""

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        self._activation, self._num_classes = spec.activation, len(spec.class_names)
        self._thresholds = np.array(spec.thresholds or config.eval.threshold) if config.data.multi_label else None
        self._batches: list[ClassCounts] = []

    def add(self, logits: np.ndarray, labels: Sequence[np.ndarray]) -> None:
        """Add a batch: logits [B, num_classes], and the classes of each image."""
        if self._thresholds is None:
            first = np.array([image_labels[0] for image_labels in labels])
            self._batches.append(ClassCounts.of_labels(first, logits.argmax(axis=1), self._num_classes))
            return
        is_label = np.zeros(logits.shape, bool)
        for row, image_labels in zip(is_label, labels, strict=True):
            row[image_labels] = True
        is_predicted = to_probabilities(logits, self._activation) >= self._thresholds
        self._batches.append(ClassCounts.of_several_labels(is_label, is_predicted))

    def counts(self) -> ClassCounts:
        """Return the sum of all batches."""
        names = ("num_correct", "num_predicted", "support")
        return ClassCounts(*(sum(getattr(batch, name) for batch in self._batches) for name in names))


def header(config: Config, spec: ModelSpec, comparison: Comparison | None, counts: ClassCounts | None) -> str:
    """Return the YAML header that Hugging Face's hub reads (huggingface.co/docs/hub/model-cards)."""
    task = "image-classification" if spec.class_names else "image-feature-extraction"
    content: dict[str, Any] = {
        "license": config.export.license,
        "library_name": "paddlepaddle",
        "pipeline_tag": task,
        "tags": ["vision-transformer", "vit", "vit_static"],
    }
    metrics = []
    if comparison is not None and comparison.top1_exported is not None and not config.data.multi_label:
        metrics.append({"type": "accuracy", "name": "Top-1 accuracy", "value": _share(comparison.top1_exported / 100)})
    if counts is not None:
        metrics.append({"type": "f1", "name": "Macro F1", "value": _share(counts.macro(counts.f1))})
    if metrics:
        content["metrics"] = [metric["type"] for metric in metrics]
        dataset = {"type": "imagefolder", "name": Path(config.data.root).name or "images", "split": "validation"}
        result = {"task": {"type": task}, "dataset": dataset, "metrics": metrics}
        content["model-index"] = [{"name": config.name, "results": [result]}]
    # ASCII, so that no name has a character that controls a terminal
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _share(value: float) -> float:
    return round(value, 4)


def recipe_rows(config: Config) -> list[list[str]]:
    """Return keys and values of the config that determine the weights: the main ones, and all that aren't defaults."""
    rows = {}
    for key, value, is_default in _settings(config):
        if key in _ALWAYS or not is_default:
            rows[key] = value
    ordered = [key for key in _ALWAYS if key in rows] + [key for key in rows if key not in _ALWAYS]
    return [[key, _format(rows[key])] for key in ordered]


def _settings(config: Config) -> Iterator[tuple[str, Any, bool]]:
    """Yield the keys of a recipe with their values, and whether these are the defaults."""
    yield "seed", config.seed, False
    for name in _SECTIONS:
        section = getattr(config, name)
        assert isinstance(section, Section)
        for field, info in type(section).model_fields.items():
            key, value = f"{name}.{info.alias or field}", getattr(section, field)
            if key not in _NOT_RECIPE and not info.exclude:
                yield key, value, value == info.get_default(call_default_factory=True)


def _format(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_format, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def class_rows(counts: ClassCounts, names: Sequence[str]) -> tuple[list[list[str]], str]:
    """Return rows of name, precision, recall, F1 in per cent, and number of images; and a sentence about them.

    Of more than 100 classes they are those with the lowest F1.
    """
    order = np.arange(len(names)) if len(names) <= _MAX_CLASSES else np.argsort(counts.f1, kind="stable")[:_MAX_CLASSES]
    rows = [
        [
            names[int(label)],
            *(f"{100.0 * values[label]:.1f}" for values in (counts.precision, counts.recall, counts.f1)),
            str(counts.support[label]),
        ]
        for label in order
    ]
    macro = f"Macro F1 {100.0 * counts.macro(counts.f1):.2f} %."
    if len(names) > _MAX_CLASSES:
        macro += f" Of {len(names)} classes, these {_MAX_CLASSES} have the lowest F1."
    return rows, macro


def limits(spec: ModelSpec, counts: ClassCounts | None) -> list[str]:
    """Return what the model can't do, or what isn't known about it, as sentences."""
    height, width = spec.model.image_size
    sentences = [
        "The metrics are those of the validation images; other images (another camera, place or time) may give worse "
        "ones. Neither fairness nor robustness has been measured.",
        f"The model sees {height}x{width} pixels: what is too small in them can't be recognized.",
    ]
    if not spec.class_names:
        return sentences
    if spec.thresholds is None:
        sentences.append(
            f"It knows {len(spec.class_names)} classes and gives every image some of them, even if none is right."
        )
    if spec.temperature == 1.0:
        sentences.append("The probabilities are not calibrated (`export.temperature: fit` does that).")
    if counts is not None:
        num_rare = int(((counts.support > 0) & (counts.support < _MIN_SUPPORT)).sum())
        num_absent = int((counts.support == 0).sum())
        if num_rare:
            sentences.append(f"Classes with fewer than {_MIN_SUPPORT} validation images: {num_rare}.")
        if num_absent:
            sentences.append(f"Classes without validation images: {num_absent}.")
    return sentences

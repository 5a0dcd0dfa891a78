"""Values that an export chooses on the validation images: the temperature of the logits and the classes' thresholds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import paddle

from vit_static.config.schema import Config
from vit_static.inference.artifact import ModelSpec
from vit_static.inference.probabilities import to_probabilities
from vit_static.model.vit import VisionTransformer
from vit_static.report.calibration import calibration_of, fit_temperature
from vit_static.report.class_metrics import ClassCounts, max_f1_thresholds

Batches = Iterable[tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]]  # exporter.read_batches


def needs_validation(config: Config) -> bool:
    """Return whether an export of this config chooses anything on the validation images."""
    has_head = config.model.num_classes > 0
    return has_head and (config.export.temperature == "fit" or _fits_thresholds(config))


def _fits_thresholds(config: Config) -> bool:
    return config.data.multi_label and config.export.thresholds == "max_f1"


def calibrate(model: VisionTransformer, spec: ModelSpec, config: Config, batches: Batches) -> tuple[ModelSpec, str]:
    """Return the spec with its temperature and thresholds, and lines about them.

    The temperature is divided into the weights and bias of the model's head, so that the logits of every exported file
    are calibrated, whichever program runs it. The thresholds apply to the probabilities after that. All logits of
    `batches` are in memory at once, with 5 bytes per image and class.
    """
    logits, is_label = _validation_logits(model, batches, len(spec.class_names))
    lines = []
    if config.export.temperature == "fit":
        targets = is_label.argmax(axis=1) if spec.activation == "softmax" else is_label
        temperature = fit_temperature(logits, targets, spec.activation)
        _scale_head(model, 1.0 / temperature)
        before, after = (_ece(values, is_label, spec) for values in (logits, logits / temperature))
        lines.append(
            f"temperature {temperature:.4f}, fitted on {len(logits)} validation images: expected calibration error "
            f"{before:.2f} % without it, {after:.2f} % with it, on the same images"
        )
        logits = logits / np.float32(temperature)
        spec = spec.model_copy(update={"temperature": temperature})
    if _fits_thresholds(config):
        probabilities = to_probabilities(logits, spec.activation)
        thresholds = max_f1_thresholds(is_label, probabilities, config.eval.threshold)
        default, chosen = (_macro_f1(is_label, probabilities >= value) for value in (config.eval.threshold, thresholds))
        lines.append(
            f"a threshold per class, with the highest F1 on {len(logits)} validation images: macro F1 {default:.2f} % "
            f"at {config.eval.threshold:g}, {chosen:.2f} % with these thresholds, on the same images"
        )
        spec = spec.model_copy(update={"thresholds": thresholds.tolist()})
    return spec, "\n".join(lines)


def _validation_logits(model: VisionTransformer, batches: Batches, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the model's logits, [num_images, num_classes] float32, and the labels, of the same shape, bool."""
    logits, labels = [], []
    with paddle.no_grad():
        for inputs, _, batch_labels in batches:
            logits.append(model(paddle.to_tensor(inputs)).numpy())
            labels += batch_labels
    is_label = np.zeros((len(labels), num_classes), bool)
    for row, image_labels in zip(is_label, labels, strict=True):
        row[image_labels] = True
    return np.concatenate(logits), is_label


def _scale_head(model: VisionTransformer, factor: float) -> None:
    assert model.head is not None
    for parameter in (model.head.weight, model.head.bias):
        parameter.set_value(parameter * factor)


def _ece(logits: np.ndarray, is_label: np.ndarray, spec: ModelSpec) -> float:
    """Return the calibration error in per cent: of the top class for softmax, else of every class's probability."""
    probabilities = to_probabilities(logits, spec.activation)
    if spec.activation != "softmax":
        return 100.0 * calibration_of(probabilities, is_label).ece
    is_correct = np.take_along_axis(is_label, probabilities.argmax(axis=1)[:, None], axis=1)[:, 0]
    return 100.0 * calibration_of(probabilities.max(axis=1), is_correct).ece


def _macro_f1(is_label: np.ndarray, is_predicted: np.ndarray) -> float:
    counts = ClassCounts.of_several_labels(is_label, is_predicted)
    return 100.0 * counts.macro(counts.f1)

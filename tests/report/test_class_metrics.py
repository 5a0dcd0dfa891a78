"""Metrics by class and calibration, compared with scikit-learn, SciPy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax
from sklearn import metrics as sklearn_metrics

from vit_static.report.calibration import MIN_TEMPERATURE, calibration_of, fit_temperature
from vit_static.report.class_metrics import ClassCounts, average_precision, max_f1_thresholds

NUM_IMAGES, NUM_CLASSES = 400, 9


def several_labels(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, of which class 7 has none and class 8 all, and logits with many equal ones."""
    random = np.random.default_rng(seed)
    is_label = random.random((NUM_IMAGES, NUM_CLASSES)) < np.linspace(0.02, 0.6, NUM_CLASSES)
    is_label[:, 7], is_label[:, 8] = False, True
    return is_label, np.round(random.normal(2.0 * is_label - 1.5, 1.5), 1)


def test_counts_of_one_label_per_image_are_scikit_learns() -> None:
    """Class 8 is neither a label nor predicted, class 7 only predicted, class 6 only a label."""
    random = np.random.default_rng(2)
    labels, predicted = random.integers(0, 7, NUM_IMAGES), random.integers(0, 6, NUM_IMAGES)
    predicted[random.random(NUM_IMAGES) < 0.5] = 0
    predicted[:3] = 7
    counts = ClassCounts.of_labels(labels, predicted, NUM_CLASSES)
    expected = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(NUM_CLASSES), zero_division=0
    )
    for values, expected_values in zip(
        (counts.precision, counts.recall, counts.f1, counts.support), expected, strict=True
    ):
        np.testing.assert_allclose(values, expected_values, rtol=1e-14)
    macro_f1 = sklearn_metrics.f1_score(labels, predicted, average="macro", zero_division=0)
    assert counts.macro(counts.f1) == pytest.approx(macro_f1, rel=1e-14)
    balanced = sklearn_metrics.recall_score(labels, predicted, labels=range(7), average="macro", zero_division=0)
    assert counts.balanced_accuracy == pytest.approx(balanced, rel=1e-14)


def test_counts_of_several_labels_are_scikit_learns() -> None:
    is_label, logits = several_labels(3)
    is_predicted = expit(logits) >= 0.5
    counts = ClassCounts.of_several_labels(is_label, is_predicted)
    given = {"y_true": is_label, "y_pred": is_predicted, "zero_division": 0}
    expected = sklearn_metrics.precision_recall_fscore_support(**given)
    for values, expected_values in zip(
        (counts.precision, counts.recall, counts.f1, counts.support), expected, strict=True
    ):
        np.testing.assert_allclose(values, expected_values, rtol=1e-14)
    assert counts.macro(counts.f1) == pytest.approx(sklearn_metrics.f1_score(**given, average="macro"), rel=1e-14)
    micro = counts.micro()
    for values, function in (
        (micro.f1, sklearn_metrics.f1_score),
        (micro.precision, sklearn_metrics.precision_score),
        (micro.recall, sklearn_metrics.recall_score),
    ):
        assert values[0] == pytest.approx(function(**given, average="micro"), rel=1e-14)


def test_the_average_precision_is_scikit_learns() -> None:
    is_label, logits = several_labels(4)
    values = average_precision(is_label, logits)
    assert np.isnan(values[7]) and values[8] == pytest.approx(1.0, rel=1e-14)
    for label in [*range(7), 8]:
        expected = sklearn_metrics.average_precision_score(is_label[:, label], logits[:, label])
        assert values[label] == pytest.approx(expected, rel=1e-13)
    logits[5, 0] = np.nan
    last = np.nan_to_num(logits[:, 0], nan=np.nanmin(logits) - 1.0)
    expected = sklearn_metrics.average_precision_score(is_label[:, 0], last)
    assert average_precision(is_label, logits)[0] == pytest.approx(expected, rel=1e-13)


def test_no_threshold_has_a_higher_f1_than_the_chosen_one() -> None:
    is_label, logits = several_labels(5)
    probabilities = expit(logits)
    thresholds = max_f1_thresholds(is_label, probabilities, default=0.5)
    assert thresholds[7] == 0.5  # a class without images
    for label in [*range(7), 8]:
        labels, scores = is_label[:, label], probabilities[:, label]
        every = {t: sklearn_metrics.f1_score(labels, scores >= t) for t in np.unique(scores)}
        chosen = sklearn_metrics.f1_score(labels, scores >= thresholds[label])
        assert chosen == max(every.values()) and np.abs(scores - thresholds[label]).min() > 1e-4
    # Of several with the same F1, here every threshold between the scores, the nearest to the default.
    separable = max_f1_thresholds(np.array([[True], [False]]), np.array([[0.7], [0.2]]), default=0.5)
    assert separable == pytest.approx([0.45])


@pytest.mark.parametrize("num_bins", [15, 4])
def test_the_calibration_error_is_that_of_its_definition(num_bins: int) -> None:
    """Equation 3 of the paper, written with a loop over the bins (low, high]."""
    random = np.random.default_rng(6)
    confidences = np.concatenate([random.random(500), np.arange(num_bins + 1) / num_bins])
    is_correct = random.random(len(confidences)) < confidences**2
    calibration = calibration_of(confidences, is_correct, num_bins)
    expected = 0.0
    for number in range(num_bins):
        low, high = number / num_bins, (number + 1) / num_bins
        inside = (confidences > low) & (confidences <= high) | ((confidences == 0.0) & (number == 0))
        assert calibration.bins[number].num_predictions == inside.sum()
        assert calibration.bins[number].accuracy == pytest.approx(is_correct[inside].mean())
        expected += inside.mean() * abs(is_correct[inside].mean() - confidences[inside].mean())
    assert calibration.ece == pytest.approx(expected, rel=1e-12)
    assert calibration_of(np.array([np.nan]), np.array([True])).ece == 0.0


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.0])
def test_the_temperature_minimizes_the_loss(true_temperature: float) -> None:
    """Compared with SciPy's minimizer; the labels are drawn from the logits divided by the true temperature."""
    random = np.random.default_rng(7)
    logits = random.normal(0, 3, (3000, 6)).astype(np.float32)
    scaled = logits.astype(float) / true_temperature
    labels = (scaled + random.gumbel(size=scaled.shape)).argmax(axis=1)
    is_label = random.random(scaled.shape) < expit(scaled)

    def softmax_loss(temperature: float) -> float:
        return float(-log_softmax(logits.astype(float) / temperature, axis=1)[np.arange(3000), labels].mean())

    def sigmoid_loss(temperature: float) -> float:
        return float(np.logaddexp(0.0, np.where(is_label, -1, 1) * logits.astype(float) / temperature).mean())

    for activation, targets, loss in (("softmax", labels, softmax_loss), ("sigmoid", is_label, sigmoid_loss)):
        temperature = fit_temperature(logits, targets, activation)
        expected = minimize_scalar(loss, bounds=(0.1, 10.0), method="bounded", options={"xatol": 1e-7}).x
        assert temperature == pytest.approx(expected, rel=1e-4)
        assert temperature == pytest.approx(true_temperature, rel=0.1)


def test_a_model_without_errors_gets_the_lowest_temperature() -> None:
    logits = np.eye(4, dtype=np.float32)
    assert fit_temperature(logits, np.arange(4), "softmax") == pytest.approx(MIN_TEMPERATURE, rel=1e-3)

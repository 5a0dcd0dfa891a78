"""Losses and evaluation metrics, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from helpers.small import REFERENCE

from vit_static.config.data_schema import LossConfig
from vit_static.model.loss import Criterion, label_ranks, per_image_loss, top1_predictions

BATCH_SIZE = 16


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax_targets(labels: np.ndarray, num_classes: int, smoothing: float) -> np.ndarray:
    return np.eye(num_classes)[labels] * (1 - smoothing) + smoothing / num_classes


def expected_losses(logits: np.ndarray, labels: np.ndarray, name: str, smoothing: float) -> np.ndarray:
    num_classes = logits.shape[1]
    if name == "softmax":
        return -(softmax_targets(labels, num_classes, smoothing) * log_softmax(logits)).sum(axis=1)
    targets = np.eye(num_classes)[labels] * (1 - smoothing) + smoothing
    return (targets * np.logaddexp(0, -logits) + (1 - targets) * np.logaddexp(0, logits)).sum(axis=1)


def logits_and_labels(num_classes: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_classes)
    logits = (scale * rng.standard_normal((BATCH_SIZE, num_classes))).astype(np.float32)
    return logits, rng.integers(0, num_classes, BATCH_SIZE)


def extreme_logits_and_labels(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits of 30 and -30 only; the label's is 30 in the first half of the batch, -30 in the second.

    The distance stays below 64, at which Paddle clamps logits on a CPU.
    """
    logits, labels = logits_and_labels(num_classes)
    logits = np.where(logits > 0, np.float32(30), np.float32(-30))
    logits[np.arange(BATCH_SIZE), labels] = np.repeat([30, -30], BATCH_SIZE // 2)
    return logits, labels


@pytest.mark.parametrize("make", [logits_and_labels, extreme_logits_and_labels])
@pytest.mark.parametrize("num_classes", [5, 1000])
@pytest.mark.parametrize(
    ("name", "smoothing"), [("softmax", 0.0), ("softmax", 0.1), ("sigmoid", 0.0), ("sigmoid", 1e-4)]
)
def test_loss_per_image(make, num_classes: int, name: str, smoothing: float) -> None:
    logits, labels = make(num_classes)
    losses = per_image_loss(
        paddle.to_tensor(logits), paddle.to_tensor(labels), LossConfig(name=name, label_smoothing=smoothing)
    )
    assert losses.shape == [BATCH_SIZE]
    assert losses.dtype == paddle.float32
    expected = expected_losses(logits.astype(np.float64), labels, name, smoothing)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=3e-5, atol=1e-5)  # float32, up to 1000 terms


def test_the_sigmoid_loss_is_exact_for_logits_of_50() -> None:
    logits, labels = (5 / 3) * extreme_logits_and_labels(1000)[0], extreme_logits_and_labels(1000)[1]
    losses = per_image_loss(paddle.to_tensor(logits), paddle.to_tensor(labels), LossConfig(name="sigmoid"))
    expected = expected_losses(logits.astype(np.float64), labels, "sigmoid", 0.0)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=3e-5)


def test_the_softmax_gradient_is_right_even_if_logits_are_clamped() -> None:
    """With logits 100 apart, the loss on a CPU is 64, but the gradient isn't affected."""
    logits = paddle.to_tensor([[50.0, -50.0, 0.0]], stop_gradient=False)
    Criterion(LossConfig())(logits, paddle.to_tensor([1])).backward()
    np.testing.assert_allclose(logits.grad.numpy(), [[1, -1, 0]], atol=1e-6)


def test_known_losses() -> None:
    """Equal logits give ln K. With PLSC's smoothing, the label's target is 1 and every other class's is e."""
    zeros, labels = paddle.zeros([2, 10]), paddle.to_tensor([0, 9])
    assert per_image_loss(zeros, labels, LossConfig()).tolist() == pytest.approx([np.log(10)] * 2)
    half = LossConfig(name="sigmoid", label_smoothing=0.5)
    logits = paddle.to_tensor([[2.0, 2.0]])  # targets 1 and 0.5
    expected = np.log1p(np.exp(-2.0)) + 0.5 * (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(2.0)))
    assert per_image_loss(logits, paddle.to_tensor([0]), half).item() == pytest.approx(expected)


def test_the_loss_of_half_precision_logits_is_summed_in_float32() -> None:
    logits, labels = logits_and_labels(1000)
    low = paddle.to_tensor(logits).astype("bfloat16")
    losses = per_image_loss(low, paddle.to_tensor(labels), LossConfig(name="sigmoid"))
    assert losses.dtype == paddle.float32
    expected = expected_losses(low.astype("float64").numpy(), labels, "sigmoid", 0.0)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_classes", [5, 1000])
def test_the_softmax_gradient_is_probabilities_minus_targets(num_classes: int, smoothing: float) -> None:
    values, labels = logits_and_labels(num_classes)
    logits = paddle.to_tensor(values, stop_gradient=False)
    Criterion(LossConfig(label_smoothing=smoothing))(logits, paddle.to_tensor(labels)).backward()
    probabilities = np.exp(log_softmax(values.astype(np.float64)))
    expected = (probabilities - softmax_targets(labels, num_classes, smoothing)) / BATCH_SIZE
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-4, atol=1e-8)


def test_the_sigmoid_gradient_is_probabilities_minus_targets() -> None:
    values, labels = logits_and_labels(1000)
    logits = paddle.to_tensor(values, stop_gradient=False)
    Criterion(LossConfig(name="sigmoid", label_smoothing=1e-4))(logits, paddle.to_tensor(labels)).backward()
    targets = np.eye(1000)[labels] * (1 - 1e-4) + 1e-4
    expected = (1 / (1 + np.exp(-values.astype(np.float64))) - targets) / BATCH_SIZE
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-4, atol=1e-8)


def ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return label_ranks(paddle.to_tensor(logits.astype(np.float32)), paddle.to_tensor(labels)).numpy()


@pytest.mark.parametrize("num_classes", [2, 5, 1000])
@pytest.mark.parametrize("levels", [None, 3, 1])
def test_ranks_are_positions_in_a_stable_sort(num_classes: int, levels: int | None) -> None:
    """With 3 levels there are many ties; with 1 all scores are tied, and a label's rank is its class number."""
    logits, labels = logits_and_labels(num_classes)
    if levels is not None:
        logits = np.floor(np.abs(logits)) % levels
    order = np.argsort(-logits, axis=1, kind="stable")
    positions = np.argmax(order == labels[:, None], axis=1)
    np.testing.assert_array_equal(ranks(logits, labels), positions)
    np.testing.assert_array_equal(ranks(logits, labels) == 0, logits.argmax(axis=1) == labels)


def test_ranks_of_a_tie() -> None:
    logits = np.array([[1.0, 3.0, 3.0, 0.0, 3.0, 2.0]] * 6)
    np.testing.assert_array_equal(ranks(logits, np.arange(6)), [4, 0, 1, 5, 2, 3])


def test_nan_scores_are_never_correct() -> None:
    logits, labels = logits_and_labels(1000)
    logits[np.arange(BATCH_SIZE), labels] = 100.0  # all correct
    logits[0, labels[0]] = np.nan
    logits[1] = np.nan
    logits[2, (labels[2] + 1) % 1000] = np.nan
    all_ranks = ranks(logits, labels)
    assert (all_ranks[:3] >= 5).all()
    assert (all_ranks[3:] == 0).all()


def test_of_equal_scores_the_lower_of_21841_classes_comes_first() -> None:
    """Consistent with the label ranks; float32 holds every class number exactly."""
    logits = np.zeros((3, 21_841), np.float32)
    logits[0, [21_840, 12_345]] = 5.0
    logits[1, 21_840] = 5.0
    classes, _ = top1_predictions(paddle.to_tensor(logits), "softmax")
    assert classes.numpy().tolist() == [12_345, 21_840, 0]
    assert ranks(logits, np.array([12_345, 21_840, 0])).tolist() == [0, 0, 0]


def test_in_training_the_criterion_returns_the_mean_loss_with_smoothing() -> None:
    logits, labels = logits_and_labels(5)
    criterion = Criterion(LossConfig(label_smoothing=0.1))
    loss = criterion(paddle.to_tensor(logits), paddle.to_tensor(labels))
    expected = expected_losses(logits.astype(np.float64), labels, "softmax", 0.1).mean()
    assert loss.shape == []
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_in_evaluation_the_criterion_returns_metrics_per_image_without_smoothing(name: str) -> None:
    logits, labels = logits_and_labels(5)
    criterion = Criterion(LossConfig(name=name, label_smoothing=0.1))
    criterion.eval()
    out = criterion(paddle.to_tensor(logits), paddle.to_tensor(labels))
    assert out.shape == [BATCH_SIZE, 4]
    np.testing.assert_allclose(
        out.numpy()[:, 0], expected_losses(logits.astype(np.float64), labels, name, 0.0), rtol=1e-5
    )
    np.testing.assert_array_equal(out.numpy()[:, 1], ranks(logits, labels))
    np.testing.assert_array_equal(out.numpy()[:, 2], logits.argmax(axis=1))
    logits = logits.astype(np.float64)
    probabilities = np.exp(log_softmax(logits)) if name == "softmax" else 1.0 / (1.0 + np.exp(-logits))
    np.testing.assert_allclose(out.numpy()[:, 3], probabilities.max(axis=1), rtol=1e-5)


@pytest.mark.parametrize(("name", "smoothing"), [("softmax", 0.1), ("sigmoid", 1e-4), ("sigmoid", 0.0)])
def test_targets_with_several_classes(name: str, smoothing: float) -> None:
    """Fractions of two classes, as with mixup, and three labels of one image, as in ImageNet-21k."""
    logits, labels = logits_and_labels(5)
    targets = np.eye(5)[labels] * 0.7 + np.eye(5)[labels[::-1]] * 0.3
    targets[0] = [1, 0, 1, 1, 0]
    losses = per_image_loss(
        paddle.to_tensor(logits),
        paddle.to_tensor(targets.astype(np.float32)),
        LossConfig(name=name, label_smoothing=smoothing),
    )
    logits = logits.astype(np.float64)
    smooth = targets * (1 - smoothing) + (smoothing / 5 if name == "softmax" else smoothing)
    expected = (
        -(smooth * log_softmax(logits)).sum(axis=1)
        if name == "softmax"
        else (smooth * np.logaddexp(0, -logits) + (1 - smooth) * np.logaddexp(0, logits)).sum(axis=1)
    )
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("levels", [None, 3, 1])
def test_the_best_rank_of_several_labels_counts(levels: int | None) -> None:
    logits, _ = logits_and_labels(9)
    if levels is not None:
        logits = np.floor(np.abs(logits)) % levels
    targets = np.random.default_rng(0).random((BATCH_SIZE, 9)) < 0.3
    targets[:, 4] = True  # at least one
    positions = np.argsort(np.argsort(-logits, axis=1, kind="stable"), axis=1)
    expected = np.where(targets, positions, 99).min(axis=1)
    np.testing.assert_array_equal(ranks(logits, targets.astype(np.float32)), expected)


def test_one_hot_targets_have_the_ranks_of_labels() -> None:
    logits, labels = logits_and_labels(1000)
    np.testing.assert_array_equal(ranks(logits, np.eye(1000, dtype=np.float32)[labels]), ranks(logits, labels))


@pytest.mark.parametrize(
    ("case", "loss", "targets"),
    [
        ("bce_labels", LossConfig(name="bce", label_smoothing=0.1), "labels"),
        ("bce_thresholded", LossConfig(name="bce", target_threshold=0.0), "soft_targets"),
        ("bce_soft", LossConfig(name="bce"), "soft_targets"),
        ("ce_soft", LossConfig(), "soft_targets"),
        ("ce_labels", LossConfig(label_smoothing=0.1), "labels"),
    ],
)
def test_losses_and_gradients_of_recipes_match_timm(case: str, loss: LossConfig, targets: str) -> None:
    golden = np.load(REFERENCE / "losses_of_recipes.npz")
    logits = paddle.to_tensor(golden["logits"], stop_gradient=False)
    mean = per_image_loss(logits, paddle.to_tensor(golden[targets]), loss).mean()
    mean.backward()
    assert float(mean) == pytest.approx(float(golden[f"{case}/loss"]), rel=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), golden[f"{case}/gradient"], atol=1e-7)

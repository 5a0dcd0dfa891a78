"""The losses and what is counted of the logits, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from helpers.small import REFERENCE

from vit_static.config.schema import LossConfig
from vit_static.model.loss import Criterion, first_classes, per_image_loss, ranks_of_labels

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


def extreme(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nothing but 30 and -30; the label's is 30 in the first half of the batch, -30 in the second.

    No farther apart: on a CPU Paddle takes a logit 64 below the greatest for the least there is.
    """
    logits, labels = logits_and_labels(num_classes)
    logits = np.where(logits > 0, np.float32(30), np.float32(-30))
    logits[np.arange(BATCH_SIZE), labels] = np.repeat([30, -30], BATCH_SIZE // 2)
    return logits, labels


@pytest.mark.parametrize("make", [logits_and_labels, extreme])
@pytest.mark.parametrize("num_classes", [5, 1000])
@pytest.mark.parametrize(
    ("name", "smoothing"), [("softmax", 0.0), ("softmax", 0.1), ("sigmoid", 0.0), ("sigmoid", 1e-4)]
)
def test_losses_of_images(make, num_classes: int, name: str, smoothing: float) -> None:
    logits, labels = make(num_classes)
    losses = per_image_loss(
        paddle.to_tensor(logits), paddle.to_tensor(labels), LossConfig(name=name, label_smoothing=smoothing)
    )
    assert losses.shape == [BATCH_SIZE]
    assert losses.dtype == paddle.float32
    expected = expected_losses(logits.astype(np.float64), labels, name, smoothing)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=3e-5, atol=1e-5)  # float32, up to 1000 terms


def test_a_sigmoid_loss_of_logits_of_50_is_exact() -> None:
    logits, labels = (5 / 3) * extreme(1000)[0], extreme(1000)[1]
    losses = per_image_loss(paddle.to_tensor(logits), paddle.to_tensor(labels), LossConfig(name="sigmoid"))
    expected = expected_losses(logits.astype(np.float64), labels, "sigmoid", 0.0)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=3e-5)


def test_the_gradient_of_a_softmax_loss_is_right_for_logits_too_far_apart_for_the_loss() -> None:
    """100 apart: on a CPU the loss says 64, but the label is pulled up with all of the strength."""
    logits = paddle.to_tensor([[50.0, -50.0, 0.0]], stop_gradient=False)
    Criterion(LossConfig())(logits, paddle.to_tensor([1])).backward()
    np.testing.assert_allclose(logits.grad.numpy(), [[1, -1, 0]], atol=1e-6)


def test_known_losses() -> None:
    """Equal logits are ln K; the seed's smoothing gives every class e, the label 1."""
    zeros, labels = paddle.zeros([2, 10]), paddle.to_tensor([0, 9])
    assert per_image_loss(zeros, labels, LossConfig()).tolist() == pytest.approx([np.log(10)] * 2)
    half = LossConfig(name="sigmoid", label_smoothing=0.5)
    logits = paddle.to_tensor([[2.0, 2.0]])  # targets 1 and 0.5
    expected = np.log1p(np.exp(-2.0)) + 0.5 * (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(2.0)))
    assert per_image_loss(logits, paddle.to_tensor([0]), half).item() == pytest.approx(expected)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, labels = logits_and_labels(1000)
    low = paddle.to_tensor(logits).astype("bfloat16")
    losses = per_image_loss(low, paddle.to_tensor(labels), LossConfig(name="sigmoid"))
    assert losses.dtype == paddle.float32
    expected = expected_losses(low.astype("float64").numpy(), labels, "sigmoid", 0.0)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_classes", [5, 1000])
def test_the_gradient_of_the_softmax_loss_is_probabilities_less_targets(num_classes: int, smoothing: float) -> None:
    values, labels = logits_and_labels(num_classes)
    logits = paddle.to_tensor(values, stop_gradient=False)
    Criterion(LossConfig(label_smoothing=smoothing))(logits, paddle.to_tensor(labels)).backward()
    probabilities = np.exp(log_softmax(values.astype(np.float64)))
    expected = (probabilities - softmax_targets(labels, num_classes, smoothing)) / BATCH_SIZE
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-4, atol=1e-8)


def test_the_gradient_of_the_sigmoid_loss_is_probabilities_less_targets() -> None:
    values, labels = logits_and_labels(1000)
    logits = paddle.to_tensor(values, stop_gradient=False)
    Criterion(LossConfig(name="sigmoid", label_smoothing=1e-4))(logits, paddle.to_tensor(labels)).backward()
    targets = np.eye(1000)[labels] * (1 - 1e-4) + 1e-4
    expected = (1 / (1 + np.exp(-values.astype(np.float64))) - targets) / BATCH_SIZE
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-4, atol=1e-8)


def ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return ranks_of_labels(paddle.to_tensor(logits.astype(np.float32)), paddle.to_tensor(labels)).numpy()


@pytest.mark.parametrize("num_classes", [2, 5, 1000])
@pytest.mark.parametrize("levels", [None, 3, 1])
def test_ranks_are_the_labels_places_in_a_stable_sort(num_classes: int, levels: int | None) -> None:
    """`levels` 3: many ties; 1: nothing but ties, where a label's rank is its own number."""
    logits, labels = logits_and_labels(num_classes)
    if levels is not None:
        logits = np.floor(np.abs(logits)) % levels
    order = np.argsort(-logits, axis=1, kind="stable")
    places = np.argmax(order == labels[:, None], axis=1)
    np.testing.assert_array_equal(ranks(logits, labels), places)
    np.testing.assert_array_equal(ranks(logits, labels) == 0, logits.argmax(axis=1) == labels)


def test_ranks_of_a_tie() -> None:
    logits = np.array([[1.0, 3.0, 3.0, 0.0, 3.0, 2.0]] * 6)
    np.testing.assert_array_equal(ranks(logits, np.arange(6)), [4, 0, 1, 5, 2, 3])


def test_scores_that_are_nan_hit_nothing() -> None:
    logits, labels = logits_and_labels(1000)
    logits[np.arange(BATCH_SIZE), labels] = 100.0  # hits, all of them
    logits[0, labels[0]] = np.nan
    logits[1] = np.nan
    logits[2, (labels[2] + 1) % 1000] = np.nan
    found = ranks(logits, labels)
    assert (found[:3] >= 5).all()
    assert (found[3:] == 0).all()


def test_the_first_class_is_the_lower_of_equal_ones_and_any_of_21841() -> None:
    """As the label ranks have it, so that a hit is a hit; in float32 every class has its number."""
    logits = np.zeros((3, 21_841), np.float32)
    logits[0, [21_840, 12_345]] = 5.0
    logits[1, 21_840] = 5.0
    classes, _ = first_classes(paddle.to_tensor(logits), "softmax")
    assert classes.numpy().tolist() == [12_345, 21_840, 0]
    assert ranks(logits, np.array([12_345, 21_840, 0])).tolist() == [0, 0, 0]


def test_training_the_criterion_gives_the_mean_with_smoothing() -> None:
    logits, labels = logits_and_labels(5)
    criterion = Criterion(LossConfig(label_smoothing=0.1))
    loss = criterion(paddle.to_tensor(logits), paddle.to_tensor(labels))
    expected = expected_losses(logits.astype(np.float64), labels, "softmax", 0.1).mean()
    assert loss.shape == []
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_evaluating_it_gives_each_images_loss_without_smoothing_and_rank(name: str) -> None:
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
def test_targets_of_several_classes(name: str, smoothing: float) -> None:
    """Shares of two classes, as mixup has them, and three whole labels, as ImageNet-21k has them."""
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
def test_of_several_labels_the_one_that_comes_first_counts(levels: int | None) -> None:
    logits, _ = logits_and_labels(9)
    if levels is not None:
        logits = np.floor(np.abs(logits)) % levels
    targets = np.random.default_rng(0).random((BATCH_SIZE, 9)) < 0.3
    targets[:, 4] = True  # at least one
    places = np.argsort(np.argsort(-logits, axis=1, kind="stable"), axis=1)
    expected = np.where(targets, places, 99).min(axis=1)
    np.testing.assert_array_equal(ranks(logits, targets.astype(np.float32)), expected)


def test_one_hot_targets_rank_as_labels_do() -> None:
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
def test_the_recipes_losses_and_gradients_are_timms(case: str, loss: LossConfig, targets: str) -> None:
    golden = np.load(REFERENCE / "losses_of_recipes.npz")
    logits = paddle.to_tensor(golden["logits"], stop_gradient=False)
    mean = per_image_loss(logits, paddle.to_tensor(golden[targets]), loss).mean()
    mean.backward()
    assert float(mean) == pytest.approx(float(golden[f"{case}/loss"]), rel=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), golden[f"{case}/gradient"], atol=1e-7)

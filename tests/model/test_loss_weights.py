"""Class weights, weights of positives and the focal loss, against the documented formulas in float64.

Those of torch: CrossEntropyLoss(weight), with targets that are class probabilities, is -sum_c w_c y_c log p_c;
BCEWithLogitsLoss(weight, pos_weight) is -w_n (p_c y_c log s(x_c) + (1 - y_c) log(1 - s(x_c))).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.small import SMALL, images_and_labels

from vit_static.config.data_schema import LossConfig
from vit_static.config.schema import OptimConfig
from vit_static.model.loss import Criterion, per_image_loss
from vit_static.model.loss_weights import LossWeights
from vit_static.model.vit import VisionTransformer

NUM_IMAGES, NUM_CLASSES = 16, 7
RNG = np.random.default_rng(0)
LOGITS = (4.0 * RNG.standard_normal((NUM_IMAGES, NUM_CLASSES))).astype(np.float32)
LABELS = RNG.integers(0, NUM_CLASSES, NUM_IMAGES)
WEIGHTS = RNG.uniform(0.2, 5.0, NUM_CLASSES).astype(np.float32)
POS_WEIGHTS = RNG.uniform(0.2, 5.0, NUM_CLASSES).astype(np.float32)


def targets_of(kind: str) -> np.ndarray:
    """Return labels [B], or targets [B, K] as of mixup, or of images with up to three labels, the first with none."""
    one_hot = np.eye(NUM_CLASSES)[LABELS]
    several = np.clip(one_hot + one_hot[::-1] + np.roll(one_hot, 3, axis=0), 0, 1)
    several[0] = 0
    return {"labels": LABELS, "mixup": 0.7 * one_hot + 0.3 * one_hot[::-1], "several": several}[kind]


def expected_losses(kind: str, loss: LossConfig, weights: LossWeights, logits: np.ndarray = LOGITS) -> np.ndarray:
    """Compute the losses [B] from the formulas, term by term."""
    x = logits.astype(np.float64)
    y = np.eye(NUM_CLASSES)[LABELS] if kind == "labels" else targets_of(kind)
    w = np.ones(NUM_CLASSES) if weights.classes is None else weights.classes.astype(np.float64)
    pos = np.ones(NUM_CLASSES) if weights.positives is None else weights.positives.astype(np.float64)
    e, gamma = loss.label_smoothing, loss.focal_gamma
    smooth = y * (1 - e) + (e if loss.name == "sigmoid" else e / NUM_CLASSES)
    if loss.name == "softmax":
        p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
        return -(w * smooth * (1 - p) ** gamma * np.log(p)).sum(axis=1)
    p = 1 / (1 + np.exp(-x))
    terms = -(pos * smooth * (1 - p) ** gamma * np.log(p) + (1 - smooth) * p**gamma * np.log(1 - p))
    image_weights = np.array([(row * w).sum() / row.sum() if row.sum() else 1.0 for row in y])
    return image_weights * (terms.mean(axis=1) if loss.name == "bce" else terms.sum(axis=1))


ALL = LossWeights(WEIGHTS, POS_WEIGHTS)
CASES = [
    (LossConfig(), LossWeights(WEIGHTS), "labels"),
    (LossConfig(label_smoothing=0.1), LossWeights(WEIGHTS), "labels"),
    (LossConfig(label_smoothing=0.1), LossWeights(WEIGHTS), "mixup"),
    (LossConfig(focal_gamma=2.0), LossWeights(), "labels"),
    (LossConfig(focal_gamma=0.5, label_smoothing=0.1), LossWeights(WEIGHTS), "mixup"),
    (LossConfig(name="bce"), LossWeights(WEIGHTS), "labels"),
    (LossConfig(name="bce"), LossWeights(None, POS_WEIGHTS), "mixup"),
    (LossConfig(name="bce", focal_gamma=2.0, label_smoothing=0.1), ALL, "several"),
    (LossConfig(name="sigmoid", focal_gamma=0.5), LossWeights(), "labels"),
    (LossConfig(name="sigmoid"), LossWeights(None, POS_WEIGHTS), "several"),
    (LossConfig(name="sigmoid", focal_gamma=1.0, label_smoothing=1e-3), ALL, "mixup"),
]


@pytest.mark.parametrize(("loss", "weights", "kind"), CASES)
def test_losses_and_gradients_follow_the_formulas(loss: LossConfig, weights: LossWeights, kind: str) -> None:
    """The gradient is compared with central differences of the formula."""
    targets = targets_of(kind)
    logits = paddle.to_tensor(LOGITS, stop_gradient=False)
    labels = paddle.to_tensor(targets if kind == "labels" else targets.astype(np.float32))
    losses = per_image_loss(logits, labels, loss, weights)
    losses.mean().backward()
    np.testing.assert_allclose(losses.numpy(), expected_losses(kind, loss, weights), rtol=2e-5)
    gradient = np.empty(LOGITS.shape)
    for c in range(NUM_CLASSES):
        step = 1e-5 * np.eye(NUM_CLASSES)[c]
        above, below = (expected_losses(kind, loss, weights, LOGITS + sign * step) for sign in (1, -1))
        gradient[:, c] = (above - below) / 2e-5 / NUM_IMAGES
    np.testing.assert_allclose(logits.grad.numpy(), gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "bce", "sigmoid"])
def test_a_focal_loss_stays_finite_for_certain_predictions(name: str) -> None:
    """Logits of 60 and -60, right and wrong, with a gamma at which the factor's own gradient isn't bounded."""
    logits = paddle.to_tensor([[60.0, -60.0, -60.0], [-60.0, 60.0, -60.0]], stop_gradient=False)
    loss = per_image_loss(logits, paddle.to_tensor([0, 0]), LossConfig(name=name, focal_gamma=0.5))
    loss.sum().backward()
    assert loss[0].item() < 1e-6 < 20 < loss[1].item() < 200
    assert np.isfinite(logits.grad.numpy()).all()
    assert np.abs(logits.grad.numpy()[0]).max() < 1e-6 and logits.grad.numpy()[1, 0] < -0.3


def test_weights_of_1_and_gamma_0_change_no_bit() -> None:
    ones = np.ones(NUM_CLASSES, np.float32)
    for name in ("softmax", "bce", "sigmoid"):
        loss = LossConfig(name=name, label_smoothing=0.1)
        arguments = paddle.to_tensor(LOGITS), paddle.to_tensor(LABELS), loss
        plain = per_image_loss(*arguments)
        assert (
            plain.tolist()
            == per_image_loss(*arguments, LossWeights(ones, None if name == "softmax" else ones)).tolist()
        )


def test_the_evaluation_reports_the_plain_loss() -> None:
    loss = LossConfig(name="bce", label_smoothing=0.1, focal_gamma=2.0)
    criterion = Criterion(loss, ALL)
    logits, labels = paddle.to_tensor(LOGITS), paddle.to_tensor(LABELS)
    assert criterion(logits, labels).item() == pytest.approx(expected_losses("labels", loss, ALL).mean(), rel=1e-5)
    criterion.eval()
    plain = expected_losses("labels", LossConfig(name="bce"), LossWeights())
    np.testing.assert_allclose(criterion(logits, labels).numpy()[:, 0], plain, rtol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "bce"])
def test_the_compiled_program_computes_these_losses_and_gradients(make_program: Callable[..., Any], name: str) -> None:
    """As the same layers do without a compiled program, with mixed targets."""
    rng = np.random.default_rng(1)
    model = VisionTransformer(SMALL.model_copy(update={"head_init_std": 0.5}))
    images, _ = images_and_labels(8)
    targets = paddle.to_tensor(rng.dirichlet(np.ones(SMALL.num_classes), 8).astype(np.float32))
    weights = LossWeights(*(rng.uniform(0.2, 5.0, SMALL.num_classes).astype(np.float32) for _ in range(2)))
    criterion = Criterion(LossConfig(name=name, focal_gamma=1.5), weights)
    loss = criterion(model(images), targets)
    loss.backward()
    norm = np.sqrt(sum(float((parameter.grad**2).sum()) for parameter in model.parameters()))
    model.clear_gradients()
    optim = OptimConfig(name="sgd", clip_norm=1e9)
    program = make_program(model, 8, optim, criterion=criterion, target_classes=SMALL.num_classes)
    assert program.loss_value(program.train_step(images, targets, 0)) == pytest.approx(loss.item(), rel=1e-5)
    assert program.grad_norm() == pytest.approx(norm, rel=1e-5)

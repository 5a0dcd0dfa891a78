"""Losses of distillation against torch's, and the images that a teacher gets against Pillow's."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from helpers.small import REFERENCE, SMALL
from PIL import Image

from vit_static.config.data_schema import LossConfig
from vit_static.config.distill_schema import DistillConfig
from vit_static.model.distill_loss import DistillCriterion, soft_label_loss
from vit_static.model.loss import Criterion
from vit_static.model.teacher import Normalization, Teacher
from vit_static.model.vit import VisionTransformer

GOLDEN = dict(np.load(REFERENCE / "distillation_losses.npz"))
WEIGHT, TEMPERATURE = 0.3, 3.0


def tensor(name: str) -> paddle.Tensor:
    return paddle.to_tensor(GOLDEN[name], stop_gradient=False)


def criterion(kind: str, **others: object) -> DistillCriterion:
    distill = DistillConfig(teacher="t", kind=kind, **{"weight": WEIGHT, **others})
    return DistillCriterion(Criterion(LossConfig()), distill)


@pytest.mark.parametrize(("kind", "others"), [("hard", {}), ("soft", {"temperature": TEMPERATURE})])
def test_losses_with_a_teacher_are_those_of_deit(kind: str, others: dict[str, float]) -> None:
    logits = tensor("logits")
    loss = criterion(kind, **others)(logits, tensor("teacher_logits").detach(), tensor("labels"))
    loss.backward()
    np.testing.assert_allclose(loss.item(), GOLDEN[f"{kind}/loss"], rtol=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), GOLDEN[f"{kind}/gradient"], rtol=1e-5, atol=1e-7)


def test_the_distillation_token_learns_the_teachers_labels() -> None:
    logits, token_logits = tensor("logits"), tensor("token_logits")
    loss = criterion("token")(logits, token_logits, tensor("teacher_logits").detach(), tensor("labels"))
    loss.backward()
    np.testing.assert_allclose(loss.item(), GOLDEN["token/loss"], rtol=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), GOLDEN["token/gradient"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(token_logits.grad.numpy(), GOLDEN["token/token_gradient"], rtol=1e-5, atol=1e-7)


def test_the_soft_loss_of_deits_code_is_smaller_by_the_number_of_classes() -> None:
    losses = soft_label_loss(tensor("logits"), tensor("teacher_logits"), TEMPERATURE)
    assert losses.mean().item() / 7 == pytest.approx(GOLDEN["soft_in_deits_code"], rel=1e-6)


def test_the_feature_loss_is_a_smooth_l1_distance_to_normalized_features() -> None:
    features, logits = tensor("features"), tensor("logits")
    loss = criterion("features", weight=1.0)(logits, features, tensor("teacher_features").detach(), tensor("labels"))
    loss.backward()
    np.testing.assert_allclose(loss.item(), GOLDEN["features/loss"], rtol=1e-6)
    np.testing.assert_allclose(features.grad.numpy(), GOLDEN["features/gradient"], rtol=1e-5, atol=1e-8)
    assert not logits.grad.numpy().any()


def test_a_student_like_its_teacher_has_no_soft_loss() -> None:
    losses = soft_label_loss(tensor("logits"), tensor("logits"), 2.0)
    np.testing.assert_allclose(losses.numpy(), 0.0, atol=1e-6)


def test_in_evaluation_the_teacher_has_no_part() -> None:
    distilled, plain = criterion("hard"), Criterion(LossConfig())
    for each in (distilled, plain):
        each.eval()
    values = (tensor("logits"), tensor("labels"))
    np.testing.assert_array_equal(distilled(*values).numpy(), plain(*values).numpy())


STUDENT = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def teacher(normalization: Normalization, student: Normalization = STUDENT, **changed: object) -> Teacher:
    network = VisionTransformer(SMALL.model_copy(update=changed))
    return Teacher(network, normalization, student, [(12, 16)], returns_features=False)


def normalized(pixels: np.ndarray, normalization: Normalization) -> np.ndarray:
    return (pixels - normalization.mean) / normalization.std


@pytest.mark.parametrize("size", [(12, 16), (24, 8), (8, 32)], ids=str)
def test_a_teacher_gets_the_images_in_its_own_size_and_normalization(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.random((2, 3, 12, 16))
    height, width = size
    resized = np.array(
        [
            [np.array(Image.fromarray(channel.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
             for channel in image]
            for image in pixels
        ]
    )  # fmt: skip
    theirs = Normalization((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    images = paddle.to_tensor(normalized(pixels, STUDENT).astype(np.float32))
    converted = teacher(theirs, image_size=size).convert(images).numpy()
    np.testing.assert_allclose(converted, normalized(resized, theirs), atol=2e-6)


def test_images_of_the_teachers_kind_stay_as_they_are() -> None:
    images = paddle.to_tensor(np.random.default_rng(0).random((2, 3, 12, 16)).astype(np.float32))
    same = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert teacher(same).convert(images).numpy().tobytes() == images.numpy().tobytes()


def test_a_teacher_of_colour_images_gets_greyscale_ones_and_the_other_way_round() -> None:
    rng = np.random.default_rng(1)
    grey, colour = rng.random((2, 1, 12, 16)), rng.random((2, 3, 12, 16))
    one = Normalization((0.3,), (0.25,))
    images = paddle.to_tensor(normalized(grey, one).astype(np.float32))
    expected = normalized(np.repeat(grey, 3, axis=1), STUDENT)
    np.testing.assert_allclose(teacher(STUDENT, one).convert(images).numpy(), expected, atol=2e-6)
    images = paddle.to_tensor(normalized(colour, STUDENT).astype(np.float32))
    luma = 0.299 * colour[:, :1] + 0.587 * colour[:, 1:2] + 0.114 * colour[:, 2:]
    converted = teacher(one, STUDENT, num_channels=1).convert(images).numpy()
    np.testing.assert_allclose(converted, normalized(luma, one), atol=2e-6)

"""The compiled step with a teacher against the same layers outside of a program: losses, gradients, images."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from helpers.small import MESH_MODEL, images_and_labels

from vit_static.config.data_schema import AugmentConfig, DataConfig, LossConfig
from vit_static.config.distill_schema import DistillConfig
from vit_static.config.schema import Config, OptimConfig
from vit_static.data.mixup import Mixup
from vit_static.model.distill_loss import feature_loss, hard_label_loss, soft_label_loss
from vit_static.model.loss import per_image_loss
from vit_static.model.teacher import Normalization, Teacher
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.dist_values import local_array
from vit_static.parallel.mesh import Mesh
from vit_static.program.precision import Precision
from vit_static.program.program import Program

LR, WEIGHT, TEMPERATURE, BATCH_SIZE = 0.5, 0.3, 2.0, 8
# Dropout and drop path would change its answers in training; it is wider, and its images are larger.
TEACHER = {"width": 48, "num_heads": 4, "image_size": (16, 20), "dropout": 0.5, "drop_path_rate": 0.5, "depth": 1}


def randomized(model: paddle.nn.Layer, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.set_value((parameter.numpy() + rng.normal(0.0, 0.2, parameter.shape)).astype(np.float32))


@pytest.mark.parametrize("kind", ["soft", "token", "features"])  # the token learns hard labels
def test_a_step_with_a_teacher_is_that_of_its_definition(cpu_mesh: Mesh, kind: str) -> None:
    """One step of SGD on mixed images, which the teacher sees as they are mixed."""
    student = MESH_MODEL.model_copy(update={"depth": 1, "distillation_token": kind == "token"})
    temperature = {"temperature": TEMPERATURE} if kind == "soft" else {}
    config = Config(
        name="distilled",
        model=student,
        data=DataConfig(global_batch_size=BATCH_SIZE),
        augment=AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0),
        loss=LossConfig(label_smoothing=0.1),
        optim=OptimConfig(name="sgd", lr=LR, momentum=0.0, clip_norm=None),
        distill=DistillConfig(teacher="t", kind=kind, weight=WEIGHT, **temperature),
    )
    model = VisionTransformer(student)
    network = VisionTransformer(student.model_copy(update={**TEACHER, "distillation_token": False}))
    randomized(model, 1)
    randomized(network, 2)
    half, other = Normalization([0.5] * 3, [0.5] * 3), Normalization([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    teacher = Teacher(network, other, half, [student.image_size], returns_features=kind == "features")
    images, targets = Mixup(config.augment, student.num_classes, seed=3)(images_and_labels(BATCH_SIZE, student), 0)

    reference = VisionTransformer(student)
    reference.set_state_dict(model.state_dict())
    with paddle.no_grad():
        output = teacher(images)
    with paddle.static.scope_guard(paddle.static.Scope()):
        program = Program.for_training(
            config,
            model,
            cpu_mesh,
            Precision("O0", "float32"),
            learning_rate=lambda step: LR,
            eval_batch_size=2,
            teacher=teacher,
        )
        projector = getattr(model, "distill_projector", None)
        start = {} if projector is None else {name: local_array(p) for name, p in projector.named_parameters()}
        loss = program.loss_value(program.train_step(images, targets, 0))
        parts = program.loss_parts()
        trained = {name: local_array(tensor) for name, tensor in program.state().items() if "@" not in name}

    features = reference.features(images)
    logits = reference.logits_of_heads(features)[0] if kind == "token" else reference.logits(features)
    parameters = dict(reference.named_parameters())
    if kind == "soft":
        distilled = soft_label_loss(logits, output, TEMPERATURE)
    elif kind == "token":
        distilled = hard_label_loss(reference.logits_of_heads(features)[1], output)
    else:
        weights = {f"distill_projector.{name}": paddle.to_tensor(value) for name, value in start.items()}
        for weight in weights.values():
            weight.stop_gradient = False
        parameters |= weights
        projected = features @ weights["distill_projector.weight"] + weights["distill_projector.bias"]
        distilled = feature_loss(projected, output)
    label_loss = per_image_loss(logits, targets, config.loss).mean()
    total = (1.0 - WEIGHT) * label_loss + WEIGHT * distilled.mean()
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    assert parts == pytest.approx({"label_loss": label_loss.item(), "distill_loss": distilled.mean().item()}, rel=1e-5)
    assert trained.keys() == parameters.keys()
    for name, parameter in parameters.items():
        expected = parameter.numpy() - LR * parameter.grad.numpy()
        np.testing.assert_allclose(trained[name], expected, rtol=2e-4, atol=2e-6, err_msg=name)

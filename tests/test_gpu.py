"""What only a card can run. Skipped without one: './run.sh test -m gpu' on a machine that has one runs these."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest
from sets import small_digits  # noqa: F401 - a fixture
from small import SMALL, images_and_labels

from vit_static import mesh as mesh_module
from vit_static.config import AmpConfig, AugmentConfig, DataConfig, EvalConfig, LossConfig, OptimConfig
from vit_static.loss import Criterion
from vit_static.model import build
from vit_static.step import Precision, Program

pytestmark = pytest.mark.gpu


@pytest.fixture
def card() -> mesh_module.Mesh:
    return mesh_module.start(mesh_module.Sizes(1, 1, 1), "gpu")


def losses_on(card: mesh_module.Mesh, precision: Precision, grad_accum_steps: int = 1) -> tuple[list[float], Program]:
    paddle.seed(3)
    program = Program(
        build(SMALL.model_copy(update={"width": 48})),  # heads of 16 channels, which flash attention takes
        Criterion(LossConfig()),
        card,
        precision,
        image_size=SMALL.image_size,
        batch_size=8,
        eval_batch_size=8,
        optim=OptimConfig(weight_decay=0.1),
        amp=AmpConfig(),
        learning_rate=lambda step: 1e-3,
        grad_accum_steps=grad_accum_steps,
    )
    losses = []
    for step in range(10):
        images, labels = images_and_labels(8, seed=step)
        loss = program.train_step(images.cuda(), labels.cuda(), step)
        losses.append(program.scalar(loss))
    return losses, program


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_o2_trains_as_float32_does(card: mesh_module.Mesh, dtype: str) -> None:
    expected, _ = losses_on(card, Precision("O0", "float32"))
    got, _ = losses_on(card, Precision("O2", dtype))
    np.testing.assert_allclose(got, expected, rtol=3e-2)


def test_o2_keeps_float32_masters_and_scales_the_loss(card: mesh_module.Mesh) -> None:
    _, program = losses_on(card, Precision("O2", "float16"))
    names = {op.name() for op in program.compiled("train").global_block().ops}
    assert any("check_finite_and_unscale" in name for name in names)
    assert any("update_loss_scaling" in name for name in names)
    assert any("flash_attn" in name for name in names)
    kept = {name.split("@")[1] for name in program.state() if "@" in name}
    assert any("master" in name for name in kept)


def test_accumulation_on_the_card(card: mesh_module.Mesh) -> None:
    whole, _ = losses_on(card, Precision("O0", "float32"))
    parts, _ = losses_on(card, Precision("O0", "float32"), grad_accum_steps=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-3)


def test_the_cards_pixels_are_the_cpus(small_digits: Path) -> None:  # noqa: F811
    """Other decoders, the same operations: a mean difference below 2 of 255 levels."""
    from vit_static.data.feed import EvalFeed, TrainFeed
    from vit_static.data.images import list_images

    data = DataConfig(root=str(small_digits), global_batch_size=16)
    images = list_images(data, "train", 10)
    batches = {}
    for device_id in (None, 0):
        feed = TrainFeed(
            images, (32, 32), data, AugmentConfig(), seed=0, start_step=0, dp_rank=0, dp_size=1, device_id=device_id
        )
        evaluation = EvalFeed(images, (32, 32), 16, data, EvalConfig(), dp_rank=0, dp_size=1, device_id=device_id)
        batches[device_id] = [next(feed)[0].numpy(), next(iter(evaluation))[0].numpy()]
    for on_cpu, on_card in zip(batches[None], batches[0], strict=True):
        assert np.abs(on_cpu - on_card).mean() * 127.5 < 2.0

"""The number of steps of a run, from its epochs and its images."""

from __future__ import annotations

import pytest

from vit_static.config.schema import TrainConfig
from vit_static.optim.schedule import limiting_key, total_steps


@pytest.mark.parametrize(
    ("epochs", "max_steps", "num_images", "global_batch_size", "steps"),
    [
        (1, None, 100, 10, 10),
        (1, None, 109, 10, 10),  # the last images that don't fill a batch are dropped
        (2, None, 109, 10, 21),  # but a batch may span two epochs
        (0.5, None, 100, 10, 5),
        (1, None, 3, 10, 1),
        (1e-9, None, 100, 10, 1),
        (5, 7, 100, 10, 7),
        (5, 1000, 100, 10, 50),
        (300, None, 1_281_167, 4096, 93_835),  # PLSC's B/16 at 224
        (8, None, 1_281_167, 512, 20_018),  # PLSC's finetuning at 384
    ],
)
def test_total_steps(epochs: float, max_steps: int | None, num_images: int, global_batch_size: int, steps: int) -> None:
    assert total_steps(TrainConfig(epochs=epochs, max_steps=max_steps), num_images, global_batch_size) == steps


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        ({}, "epochs"),
        ({"max_steps": 50}, "epochs"),  # as many as the epochs have
        ({"max_steps": 49}, "max_steps"),
        ({"max_images": 490}, "max_images"),
        ({"max_images": 490, "max_steps": 48}, "max_steps"),
        ({"max_images": 470, "max_steps": 48}, "max_images"),
    ],
)
def test_the_key_that_ends_a_run_is_known(limits: dict[str, int], key: str) -> None:
    assert limiting_key(TrainConfig(epochs=5, **limits), 100, 10) == key

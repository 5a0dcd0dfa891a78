"""Learning-rate schedules, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vit_static.config.schema import OptimConfig, ScheduleConfig, TrainConfig
from vit_static.optim.schedule import learning_rate, total_steps, warmup_steps

PEAK = 0.4


def rate_at(step: int, name: str, total_steps: int = 110, warmup_steps: int = 10, end_lr: float = 0.0) -> float:
    schedule = ScheduleConfig(name=name, warmup_steps=warmup_steps, end_lr=end_lr)
    return learning_rate(step, total_steps, OptimConfig(lr=PEAK), schedule)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_warmup_rises_linearly_from_0_to_the_peak(name: str) -> None:
    assert rate_at(0, name) == 0.0
    assert rate_at(1, name) == pytest.approx(PEAK / 10, rel=1e-12)
    assert rate_at(5, name) == pytest.approx(PEAK / 2, rel=1e-12)
    assert rate_at(10, name) == pytest.approx(PEAK, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "quarter", "half", "last", "end"),
    [
        # 10 steps of warmup and 100 of decay: a quarter of the decay is at step 35, half at 60, the last update at 109.
        (
            "cosine",
            0.1 + (PEAK - 0.1) * (2 + math.sqrt(2)) / 4,
            (PEAK + 0.1) / 2,
            0.1 + (PEAK - 0.1) * math.sin(math.pi / 200) ** 2,
            0.1,
        ),
        ("linear", 0.75 * PEAK + 0.25 * 0.1, (PEAK + 0.1) / 2, 0.01 * PEAK + 0.99 * 0.1, 0.1),
        ("constant", PEAK, PEAK, PEAK, PEAK),
    ],
)
def test_the_decay(name: str, quarter: float, half: float, last: float, end: float) -> None:
    rates = [rate_at(step, name, end_lr=0.1) for step in (35, 60, 109, 110)]
    assert rates == pytest.approx([quarter, half, last, end], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("name", "end"), [("cosine", 0.1), ("linear", 0.1), ("constant", PEAK)])
def test_after_the_end_the_rate_is_constant(name: str, end: float) -> None:
    assert [rate_at(step, name, end_lr=0.1) for step in (111, 10**6)] == pytest.approx([end, end], abs=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_without_warmup_the_first_update_has_the_peak(name: str) -> None:
    assert rate_at(0, name, warmup_steps=0) == pytest.approx(PEAK, rel=1e-12)


def test_without_warmup_the_decay_takes_the_entire_run() -> None:
    assert rate_at(50, "cosine", total_steps=100, warmup_steps=0) == pytest.approx(PEAK / 2, rel=1e-12)
    assert rate_at(25, "linear", total_steps=100, warmup_steps=0) == pytest.approx(0.75 * PEAK, rel=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_a_warmup_longer_than_the_run_is_shortened_to_it(name: str) -> None:
    """As in PLSC, whose scheduler limits the warmup to the steps of the run."""
    rates = [rate_at(step, name, total_steps=20, warmup_steps=1000) for step in range(21)]
    assert rates == pytest.approx([PEAK * step / 20 for step in range(21)], rel=1e-12)


def test_a_run_with_one_step() -> None:
    assert rate_at(0, "cosine", total_steps=1, warmup_steps=0) == pytest.approx(PEAK)
    assert rate_at(0, "cosine", total_steps=1, warmup_steps=1) == 0.0


NUM_IMAGES_1K, NUM_IMAGES_21K = 1_281_167, 14_197_087
# name: (lr, decay, end, warmup steps, steps of the run)
PLSC_RECIPES = {
    "B/16 pretrain": (3e-3, "cosine", 0.0, 10_000, 300 * NUM_IMAGES_1K // 4096),
    "B/16 finetune": (3e-3, "cosine", 0.0, 500, 8 * NUM_IMAGES_1K // 512),
    "L/16 pretrain on 21k": (1e-3, "linear", 1e-5, 10_000, 90 * NUM_IMAGES_21K // 4096),
    "L/16 finetune": (1.5e-2, "cosine", 0.0, 500, 8 * NUM_IMAGES_1K // 512),
}


@pytest.mark.parametrize("recipe", PLSC_RECIPES)
def test_the_recipes_of_plsc(recipe: str) -> None:
    """The reference is PLSC's ViTLRScheduler: progress counts from the end of the warmup, whose factor multiplies."""
    peak, name, end, warmup_steps, total_steps = PLSC_RECIPES[recipe]
    steps = np.unique(np.concatenate([np.linspace(0, warmup_steps, 7), np.linspace(0, total_steps, 15)]).astype(int))
    assert len(steps) >= 20
    progress = np.interp(steps, [warmup_steps, total_steps], [0.0, 1.0])
    decayed = peak * np.cos(progress * np.pi / 2) ** 2 if name == "cosine" else np.interp(progress, [0, 1], [peak, end])
    expected = decayed * np.interp(steps, [0, warmup_steps], [0.0, 1.0])

    optim, schedule = OptimConfig(lr=peak), ScheduleConfig(name=name, warmup_steps=warmup_steps, end_lr=end)
    rates = [learning_rate(int(step), total_steps, optim, schedule) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-9, atol=1e-15)
    assert max(rates) == pytest.approx(peak, rel=1e-12)


def test_rsqrt_and_its_cooldown() -> None:
    """big_vision's formula: peak / sqrt(1 + steps since the warmup / timescale), and then linearly to 0."""
    schedule = ScheduleConfig(name="rsqrt", warmup_steps=10, timescale=50.0, cooldown_steps=20)
    optim = OptimConfig(lr=PEAK)
    rates = [learning_rate(step, 110, optim, schedule) for step in (5, 10, 60, 89, 90, 100, 110, 200)]
    plain = [PEAK / math.sqrt(1 + (step - 10) / 50) for step in (10, 60, 89, 90, 100)]
    assert rates[:5] == pytest.approx([PEAK / 2, *plain[:4]], rel=1e-12)
    assert rates[5:] == pytest.approx([plain[4] / 2, 0.0, 0.0], rel=1e-12)


def test_the_warmup_replaces_the_beginning_of_a_decay_counted_from_the_start() -> None:
    schedule = ScheduleConfig(warmup_steps=10, warmup_start_lr=0.1, end_lr=0.2, decay_begins="at_start")
    optim = OptimConfig(lr=PEAK)
    rates = [learning_rate(step, 100, optim, schedule) for step in (0, 5, 10, 50, 100)]
    at_10 = 0.2 + (PEAK - 0.2) * (1 + math.cos(math.pi / 10)) / 2
    assert rates == pytest.approx([0.1, (PEAK + 0.1) / 2, at_10, (PEAK + 0.2) / 2, 0.2], rel=1e-12)


def test_lengths_in_epochs_images_or_steps() -> None:
    assert warmup_steps(ScheduleConfig(warmup_epochs=2.5), 1000, 64) == 39
    assert warmup_steps(ScheduleConfig(warmup_steps=7), 1000, 64) == 7
    for train, steps in (
        ({"epochs": 2.0}, 31),
        ({"epochs": 2.0, "max_steps": 10}, 10),
        ({"max_images": 640}, 10),
        ({"epochs": 1.0, "max_images": 640, "max_steps": 12}, 10),
    ):
        assert total_steps(TrainConfig(**train), 1000, 64) == steps

"""What is due after a number of steps, as a pure function of the progress."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from vit_static.checkpoint.progress import Progress
from vit_static.config.schema import Config
from vit_static.train.run_spec import Due, RunSpec


def spec_of(num_images: int = 100, total_steps: int = 50, **sections: dict[str, Any]) -> RunSpec:
    """A run with batches of 10 images."""
    config = Config.model_validate({"name": "run", **sections, "data": {"global_batch_size": 10}})
    images: Any = range(num_images)
    shape: Any = None  # nothing that is tested here depends on the mesh
    return RunSpec(config, 0, shape, images, images, total_steps, warmup_steps=0)


def steps_due(spec: RunSpec, name: str, *, evaluated: bool = False) -> list[int]:
    """The steps of an uninterrupted run after which something is due."""
    due_steps, logged_step = [], 0
    for step in range(spec.total_steps + 1):
        due = spec.due(Progress(step, evaluated_step=step if evaluated else 0), logged_step)
        logged_step = step if due.log else logged_step
        if getattr(due, name):
            due_steps.append(step)
    return due_steps


def test_every_few_steps_are_logged_and_the_first_and_the_last_one_always() -> None:
    assert steps_due(spec_of(total_steps=23, log={"every_steps": 10}), "log") == [1, 10, 20, 23]


def test_a_step_is_logged_once() -> None:
    spec = spec_of(log={"every_steps": 10})
    assert spec.due(Progress(10), logged_step=9).log and not spec.due(Progress(10), logged_step=10).log


def test_the_phases_of_image_sizes_cover_the_steps() -> None:
    """Each begins at its share of the steps, rounded; one without a step is left out."""
    sizes = [[128, 0.4], [[192, 224], 0.41], [160, 0.81], [224, 1.0]]
    spec = spec_of(total_steps=11, train={"image_sizes": sizes})
    assert [(phase.image_size, phase.start, phase.end) for phase in spec.phases] == [
        ((128, 128), 0, 4), ((192, 224), 4, 5), ((160, 160), 5, 9), ((224, 224), 9, 11)
    ]  # fmt: skip
    assert [spec.image_size_at(step)[1] for step in (0, 3, 4, 5, 8, 9, 10, 11)] == [
        128, 128, 224, 160, 160, 224, 224, 224
    ]  # fmt: skip
    assert spec.largest_image_size == (224, 224)
    assert [phase.end for phase in spec_of(total_steps=1, train={"image_sizes": sizes}).phases] == [1]
    assert [(phase.image_size, phase.end) for phase in spec_of(total_steps=7).phases] == [((224, 224), 7)]


@pytest.mark.parametrize(
    ("every_epochs", "num_images", "expected"),
    [
        (1.0, 100, [10, 20, 25]),
        (0.5, 100, [5, 10, 15, 20, 25]),
        (2.0, 100, [20, 25]),
        (1.0, 95, [10, 19, 25]),  # an epoch ends within a batch: the evaluation follows that batch
        (0.01, 100, list(range(1, 26))),  # at most one evaluation per step
    ],
)
def test_evaluations_follow_the_end_of_an_epoch_and_the_last_step(
    every_epochs: float, num_images: int, expected: list[int]
) -> None:
    spec = spec_of(num_images, total_steps=25, eval={"every_epochs": every_epochs})
    assert steps_due(spec, "eval") == expected
    assert steps_due(spec, "eval", evaluated=True) == []


def test_an_evaluation_that_a_stop_prevented_is_due_after_the_resume() -> None:
    spec = spec_of()
    assert spec.due(Progress(10, evaluated_step=0), logged_step=10).eval
    assert not spec.due(Progress(10, evaluated_step=10), logged_step=10).eval


def test_checkpoints_follow_evaluations_unless_their_own_interval_is_set() -> None:
    assert steps_due(spec_of(total_steps=25), "save", evaluated=True) == [10, 20]
    every_4 = spec_of(total_steps=25, checkpoint={"every_steps": 4})
    assert steps_due(every_4, "save", evaluated=True) == [4, 8, 12, 16, 20, 24]


def test_nothing_is_due_before_the_first_step_and_the_last_step_is_known() -> None:
    spec = spec_of(total_steps=5)
    assert spec.due(Progress(0), 0) == Due(log=False, eval=False, save=False, last=False)
    assert not spec.due(Progress(0), 0).any
    assert spec.due(Progress(5), 0).last and spec.due(Progress(5), 0).any


def test_the_data_position_is_the_next_batch_without_the_skipped_ones() -> None:
    images: Any = type("Images", (), {"__len__": lambda _: 100, "digest": lambda _: "abc"})()
    config = Config.model_validate({"name": "run", "seed": 3, "data": {"global_batch_size": 10}})
    shape: Any = None
    spec = RunSpec(config, 0, shape, images, images, 50, 0)
    assert spec.data_position(Progress(7)).position == 70
    position = spec.data_position(Progress(7, skipped_batches=(2, 9)))
    assert (position.position, position.num_images, position.images_digest, position.seed) == (80, 100, "abc", 3)


def test_the_decisions_of_a_run_need_no_paddle() -> None:
    code = (
        "import sys; sys.modules['paddle'] = None; sys.modules['nvidia'] = None; "
        "import vit_static.train.run_spec, vit_static.train.stop"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_ends_with_its_schedule_or_after_evaluations_without_improvement() -> None:
    stale = Progress(10, metric="top1", num_stale_evals=3)
    assert not spec_of().has_ended(stale) and spec_of().has_ended(Progress(50))
    patient, impatient = (spec_of(train={"patience": patience}) for patience in (4, 3))
    assert not patient.has_ended(stale) and impatient.has_ended(stale) and impatient.due(stale, 10).last
    # With another metric than that of the count, the count begins again.
    assert not spec_of(train={"patience": 3}, eval={"metric": "loss"}).has_ended(stale)

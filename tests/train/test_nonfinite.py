"""The check for non-finite gradients and its report, apart from any program."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vit_static.checkpoint.progress import Progress
from vit_static.config.schema import Config
from vit_static.data.sampler import ShuffledSampler
from vit_static.train.nonfinite import NonFiniteGuard
from vit_static.train.run_dir import RunDir
from vit_static.train.run_spec import RunSpec


class Images:
    """As much of an image dataset as the report reads."""

    def __len__(self) -> int:
        return 40

    def name(self, index: int) -> str:
        return f"{index:03d}.jpg"


def guard(folder: Path, agree: Any = lambda value: value, *, is_writer: bool = True, **train: Any) -> NonFiniteGuard:
    config = Config.model_validate({"name": "run", "data": {"global_batch_size": 10}, "train": train})
    images: Any = Images()
    shape: Any = None
    return NonFiniteGuard(RunSpec(config, 0, shape, images, images, 50, 0), RunDir(folder, is_writer), agree)


def test_finite_gradients_write_nothing(tmp_path: Path) -> None:
    assert guard(tmp_path).check(None, Progress(5), loss=0.3) is None
    assert not list(tmp_path.iterdir())


def test_the_report_names_the_step_its_norms_and_its_images(tmp_path: Path) -> None:
    progress = Progress(9, skipped_batches=(2,))
    bad_step = guard(tmp_path).check((7, {"head": 2.0, "norm": math.nan}), progress, loss=None)
    assert bad_step is not None and (bad_step.step, bad_step.batch) == (7, 7)  # batch 2 was skipped
    path = tmp_path / "nonfinite_step_00000007.json"
    assert str(path) in bad_step.message and bad_step.message.startswith("the gradients of step 7 are not finite")
    report = json.loads(path.read_text())
    assert report["grad_norms"] == {"head": 2.0, "norm": "nan"} and report["batch"] == 7
    indices = ShuffledSampler(40, seed=0, repeated_aug=1).indices(70, 80)
    assert report["images"] == [f"{index:03d}.jpg" for index in indices]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_enough(tmp_path: Path, loss: float) -> None:
    bad_step = guard(tmp_path).check(None, Progress(5), loss)
    assert bad_step is not None and bad_step.step == 5


def test_ranks_agree_and_only_one_writes(tmp_path: Path) -> None:
    messages = [
        guard(tmp_path, lambda _: [7, {}], is_writer=is_writer).check(None, Progress(9), None)
        for is_writer in (False, True)
    ]
    assert messages[0] == messages[1] is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_rollbacks_are_limited(tmp_path: Path) -> None:
    assert not guard(tmp_path).may_roll_back(Progress(5))  # train.on_nonfinite=stop is the default
    rolls_back = guard(tmp_path, on_nonfinite="rollback", max_rollbacks=2)
    assert rolls_back.may_roll_back(Progress(5, skipped_batches=(1,)))
    assert not rolls_back.may_roll_back(Progress(5, skipped_batches=(1, 3)))

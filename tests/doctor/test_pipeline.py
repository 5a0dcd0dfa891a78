"""The check of the data pipeline: the run's own images or generated ones, damaged images, pixels that differ."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.doctor import make_subject

from vit_static.doctor import pipeline
from vit_static.doctor.check import Result, perform
from vit_static.doctor.checks import BY_NAME
from vit_static.doctor.subject import Subject


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_SECONDS", 0.05)


def check(subject: Subject) -> Result:
    return perform(BY_NAME["data"], subject)


def test_the_runs_own_images_are_used_with_its_augmentation(tmp_path: Path, small_digits: Path) -> None:
    overrides = ("augment.policy=randaugment", "augment.random_erasing_probability=1.0", "augment.color_jitter=0.3")
    result = check(make_subject(tmp_path, f"data.root={small_digits}", *overrides))
    assert result.status == "ok", result
    assert f"8 images of {small_digits}, the same bits with one thread" in result.message
    assert result.figures["images_per_s"] > 0.0


def test_without_a_data_set_photographs_are_generated(tmp_path: Path) -> None:
    result = check(make_subject(tmp_path))
    assert result.status == "ok" and "8 images (generated: there is no nowhere)" in result.message


def test_a_damaged_image_fails_with_its_name(tmp_path: Path, small_digits: Path) -> None:
    shutil.copytree(small_digits, tmp_path / "images")
    for path in (tmp_path / "images/train").glob("*/*"):
        path.write_bytes(b"no image")
    result = check(make_subject(tmp_path, f"data.root={tmp_path / 'images'}"))
    assert result.status == "failed" and "can't be read as an image" in result.message
    assert result.remedy == "./run.sh data check looks for damaged images"


@pytest.mark.parametrize(
    ("device", "difference", "status"), [("cpu", 0.001, "failed"), ("gpu", 1.0, "ok"), ("gpu", 2.0, "failed")]
)
def test_pixels_that_differ_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, difference: float, status: str
) -> None:
    """A GPU decodes JPEG with other roundings, within 1.5 grey levels on average; a CPU's threads don't matter."""
    real = pipeline.TrainLoader

    def loader(*arguments: Any, device_id: int | None, **named: Any) -> Any:
        """Brighten all pixels unless the batch is computed with one thread on the CPU."""
        is_reference = device_id is None and arguments[2].num_threads == 1
        for images, labels in real(*arguments, device_id=None, **named):
            yield images + (0.0 if is_reference else difference / 255.0 / 0.5), labels

    monkeypatch.setattr(pipeline, "TrainLoader", loader)
    result = check(make_subject(tmp_path, device=device))
    assert result.status == status, result
    if status == "failed":
        assert f"differ by {difference:.2f} of 255 grey levels on average" in result.message
        assert ("bench data --device gpu" in result.remedy) == (device == "gpu")

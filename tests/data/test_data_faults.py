"""Bad images in a run: it stops with the image's name, saves its state, and resumes once the image is repaired."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.forked_launch import run_forked_launch
from helpers.runs import TINY
from helpers.small import read_state

from vit_static.checkpoint.folder import checkpoint_dir, latest_checkpoint
from vit_static.checkpoint.resume import read_progress
from vit_static.common.errors import ConfigError, DataError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.data.open_set import open_set
from vit_static.data.sampler import ShuffledSampler
from vit_static.train.trainer import train

BATCH_SIZE, BAD_POSITION = 16, 50  # in the fourth batch


@pytest.fixture
def config(tmp_path: Path, small_digits: Path) -> Config:
    """A run on its own copy of the digits."""
    shutil.copytree(small_digits, tmp_path / "digits")
    (tmp_path / "tiny.yaml").write_text(TINY)
    return load_config(tmp_path / "tiny.yaml", [f"data.root={tmp_path}/digits", f"output_dir={tmp_path}/output"])


def image_at(config: Config, position: int) -> Path:
    """Return the training image at a position in the run's order."""
    images = open_set(config.data, "train", config.model.num_classes)
    sampler = ShuffledSampler(len(images), config.seed, config.augment.repeated_aug)
    return Path(images.name(int(sampler.indices(position, position + 1)[0])))


DAMAGES = {
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"This is not an image.\n" * 20),
    "a HEIC": lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(200)),
    "missing": lambda path: path.unlink(),
}


def stopped_by(config: Config, image: Path) -> int:
    """Train until the image stops the run, check the error, and return the number of steps in the checkpoint."""
    with pytest.raises(DataError) as error:
        train(config)
    assert str(error.value).startswith(str(image))
    assert f"./run.sh data check {config.data.root}" in str(error.value) and "\n" not in str(error.value)
    latest = latest_checkpoint(config.run_dir)
    assert latest is not None
    step = read_progress(latest)[0].step
    assert f"Stopped at step {step}," in str(error.value)
    events = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert next(line["problem"] for line in events if line.get("event") == "bad image").startswith(str(image))
    return step


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_image_stops_the_run_which_then_resumes_with_the_same_bits(
    config: Config, finished: Config, damage: str
) -> None:
    """The weights are those of a run without the bad image."""
    image = image_at(config, BAD_POSITION)
    content = image.read_bytes()
    # With class folders, a missing file wouldn't be part of the dataset, so the run uses a list file.
    paths = sorted(str(path.relative_to(config.data.root)) for path in Path(config.data.root).glob("train/*/*.jpeg"))
    (Path(config.data.root) / "list.txt").write_text("".join(f"{path} {path.split('/')[1]}\n" for path in paths))
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": "list.txt"})})
    DAMAGES[damage](image)
    step = stopped_by(config, image)
    assert 1 <= step <= BAD_POSITION // BATCH_SIZE
    image.write_bytes(content)
    assert train(config)
    ours, theirs = (read_state(run.run_dir / "model.pdparams") for run in (config, finished))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_with_augmentation_and_mixup_resumes_with_the_same_bits(config: Config, tmp_path: Path) -> None:
    """From the middle of an epoch, with everything that draws random numbers."""
    augmented = [
        "augment.policy=randaugment",
        "augment.magnitude_std=0.5",
        "augment.color_jitter=0.3",
        "augment.random_erasing_probability=0.5",
        "augment.mixup_alpha=0.8",
        "augment.cutmix_alpha=1.0",
        "augment.repeated_aug=3",
    ]
    common = [*augmented, f"data.root={config.data.root}"]
    uninterrupted = load_config(tmp_path / "tiny.yaml", [*common, f"output_dir={tmp_path}/uninterrupted"])
    assert train(uninterrupted)
    stopped = load_config(tmp_path / "tiny.yaml", [*common, f"output_dir={tmp_path}/stopped"])
    image = image_at(stopped, 5 * BATCH_SIZE)
    content = image.read_bytes()
    DAMAGES["text"](image)
    assert 1 <= stopped_by(stopped, image) <= 5
    image.write_bytes(content)
    assert train(stopped)
    ours, theirs = (read_state(run.run_dir / "model.pdparams") for run in (stopped, uninterrupted))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_bad_image_in_the_evaluation_stops_the_run_and_the_state_is_saved(config: Config) -> None:
    bad = sorted(Path(config.data.root).glob("val/*/*.jpeg"))[17]
    content = bad.read_bytes()
    DAMAGES["cut in half"](bad)
    assert stopped_by(config, bad) == 8  # the first evaluation is after the first epoch
    bad.write_bytes(content)
    assert train(config)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [8, 11]  # including the one that failed


def test_a_bad_image_in_the_first_batch_leaves_no_checkpoint(config: Config) -> None:
    image = image_at(config, 3)
    content = image.read_bytes()
    DAMAGES["text"](image)
    with pytest.raises(DataError, match=image.name):
        train(config)
    assert latest_checkpoint(config.run_dir) is None
    image.write_bytes(content)
    assert train(config)


def test_a_run_doesnt_resume_with_other_images(config: Config) -> None:
    train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 4})}))
    image = image_at(config, 0)
    moved = image.rename(image.with_name("moved.jpeg"))
    with pytest.raises(ConfigError, match="other names"):
        train(config)
    moved.unlink()
    with pytest.raises(ConfigError, match="120 images, and there are 119") as error:
        train(config)
    assert "\n" not in str(error.value) and "init.from" in str(error.value)


def test_a_run_resumes_after_its_images_have_moved(config: Config) -> None:
    train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 4})}))
    root = Path(config.data.root).rename(Path(config.data.root).with_name("elsewhere"))
    assert train(config.model_copy(update={"data": config.data.model_copy(update={"root": str(root)})}))


def test_the_data_position_is_a_few_hundred_bytes(finished: Config) -> None:
    position = json.loads((checkpoint_dir(finished.run_dir, 4) / "meta.json").read_text())["data"]
    assert position["position"] == 4 * BATCH_SIZE
    assert len(json.dumps(position)) < 300


@pytest.mark.slow
def test_two_ranks_stop_together_at_an_image_that_one_of_them_reads(config: Config, tmp_path: Path) -> None:
    image = image_at(config, BAD_POSITION + BATCH_SIZE // 2)  # in the second rank's half
    content = image.read_bytes()
    DAMAGES["cut in half"](image)
    command = ["pretrain", "-c", "tiny.yaml", "-o", "data.root=digits"]
    done = run_forked_launch(*command, cwd=tmp_path, NPROC="2")
    assert done.returncode == 2
    assert done.stderr.count(image.name) == 1 and len(done.stderr.strip().splitlines()) == 1
    latest = latest_checkpoint(tmp_path / "output/tiny")
    assert latest is not None and 1 <= read_progress(latest)[0].step <= 3
    image.write_bytes(content)
    assert run_forked_launch(*command, cwd=tmp_path, NPROC="2").returncode == 0

"""Bad images, met by a run: it ends with the name of the image and its state saved, and goes on once that is mended."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import run_sh
from helpers.runs import TINY
from helpers.small import read_state
from PIL import Image

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
    """A run on a copy of the digits of its own."""
    shutil.copytree(small_digits, tmp_path / "digits")
    (tmp_path / "tiny.yaml").write_text(TINY)
    return load_config(tmp_path / "tiny.yaml", [f"data.root={tmp_path}/digits", f"output_dir={tmp_path}/output"])


def image_at(config: Config, position: int) -> Path:
    """The training image at a position of the run's order."""
    images = open_set(config.data, "train", config.model.num_classes)
    order = ShuffledSampler(len(images), config.seed, config.augment.repeated_aug)
    return Path(images.name(int(order.indices(position, position + 1)[0])))


def as_gif(path: Path) -> bytes:
    """Another format under the same name, which Pillow reads and DALI doesn't."""
    Image.open(path).save(path.with_suffix(".gif"))
    content = path.with_suffix(".gif").read_bytes()
    path.with_suffix(".gif").unlink()
    return content


HARMS = {
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"This is no picture.\n" * 20),
    "a GIF": lambda path: path.write_bytes(as_gif(path)),
    "gone": lambda path: os.truncate(path, 0) or path.unlink(),
}


def stopped_by(config: Config, image: Path) -> int:
    """Trains until the image stops it, and checks what the error says; the number of the steps that are saved."""
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


@pytest.mark.parametrize("harm", HARMS)
def test_a_bad_image_stops_the_run_which_then_goes_on_to_the_same_bits(
    config: Config, finished: Config, harm: str
) -> None:
    """Those of a run that has never met it."""
    image = image_at(config, BAD_POSITION)
    content = image.read_bytes()
    # A file that is gone when the run begins is not listed: this one goes while the set stands listed, by a list.
    listed = sorted(str(path.relative_to(config.data.root)) for path in Path(config.data.root).glob("train/*/*.jpeg"))
    (Path(config.data.root) / "list.txt").write_text("".join(f"{path} {path.split('/')[1]}\n" for path in listed))
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": "list.txt"})})
    HARMS[harm](image)
    step = stopped_by(config, image)
    assert 1 <= step <= BAD_POSITION // BATCH_SIZE
    image.write_bytes(content)
    assert train(config)
    ours, theirs = (read_state(run.run_dir / "model.pdparams") for run in (config, finished))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_an_augmented_and_mixed_run_goes_on_to_the_same_bits(config: Config, tmp_path: Path) -> None:
    """From the middle of an epoch, with everything on that draws random numbers."""
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
    whole = load_config(tmp_path / "tiny.yaml", [*common, f"output_dir={tmp_path}/whole"])
    assert train(whole)
    stopped = load_config(tmp_path / "tiny.yaml", [*common, f"output_dir={tmp_path}/stopped"])
    image = image_at(stopped, 5 * BATCH_SIZE)
    content = image.read_bytes()
    HARMS["text"](image)
    assert 1 <= stopped_by(stopped, image) <= 5
    image.write_bytes(content)
    assert train(stopped)
    ours, theirs = (read_state(run.run_dir / "model.pdparams") for run in (stopped, whole))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_bad_image_of_the_evaluation_stops_the_run_with_its_state_saved(config: Config) -> None:
    bad = sorted(Path(config.data.root).glob("val/*/*.jpeg"))[17]
    content = bad.read_bytes()
    HARMS["cut in half"](bad)
    assert stopped_by(config, bad) == 8  # the first evaluation is after the first epoch
    bad.write_bytes(content)
    assert train(config)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [8, 11]  # the one that was missing, too


def test_a_bad_image_that_comes_first_leaves_no_checkpoint_and_no_harm(config: Config) -> None:
    image = image_at(config, 3)
    content = image.read_bytes()
    HARMS["text"](image)
    with pytest.raises(DataError, match=image.name):
        train(config)
    assert latest_checkpoint(config.run_dir) is None
    image.write_bytes(content)
    assert train(config)


def test_a_run_doesnt_go_on_with_other_images(config: Config) -> None:
    train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 4})}))
    image = image_at(config, 0)
    moved = image.rename(image.with_name("moved.jpeg"))
    with pytest.raises(ConfigError, match="other names"):
        train(config)
    moved.unlink()
    with pytest.raises(ConfigError, match="120 images, and there are 119") as error:
        train(config)
    assert "\n" not in str(error.value) and "init.from" in str(error.value)


def test_a_run_goes_on_where_its_images_have_moved(config: Config) -> None:
    train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 4})}))
    root = Path(config.data.root).rename(Path(config.data.root).with_name("elsewhere"))
    assert train(config.model_copy(update={"data": config.data.model_copy(update={"root": str(root)})}))


def test_the_place_is_a_few_hundred_bytes(finished: Config) -> None:
    place = json.loads((checkpoint_dir(finished.run_dir, 4) / "meta.json").read_text())["data"]
    assert place["position"] == 4 * BATCH_SIZE
    assert len(json.dumps(place)) < 300


@pytest.mark.slow
def test_two_ranks_stop_together_at_an_image_that_one_of_them_meets(config: Config, tmp_path: Path) -> None:
    image = image_at(config, BAD_POSITION + BATCH_SIZE // 2)  # in the second rank's half
    content = image.read_bytes()
    HARMS["cut in half"](image)
    command = ["pretrain", "-c", "tiny.yaml", "-o", "data.root=digits"]
    done = run_sh(*command, cwd=tmp_path, NPROC="2")
    assert done.returncode == 2
    assert done.stderr.count(image.name) == 1 and len(done.stderr.strip().splitlines()) == 1
    latest = latest_checkpoint(tmp_path / "output/tiny")
    assert latest is not None and 1 <= read_progress(latest)[0].step <= 3
    image.write_bytes(content)
    assert run_sh(*command, cwd=tmp_path, NPROC="2").returncode == 0

"""The loaders with every kind of source: the same images in the same order, on any number of ranks, after a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.sets import photo

from data_tools.__main__ import main
from vit_static.common.errors import DataError
from vit_static.config.data_schema import AugmentConfig, DataConfig, EvalConfig
from vit_static.data.loader import EvalLoader, TrainLoader
from vit_static.data.open_set import open_set

NUM_IMAGES, NUM_CLASSES, BATCH_SIZE = 22, 3, 8
SIZE = (32, 40)
# Everything at once, to reveal any augmentation that keeps a state of its own.
AUGMENT = AugmentConfig(policy="randaugment", magnitude_std=0.5, color_jitter=0.3, random_erasing_probability=0.5)
POLICIES = {
    "all": AUGMENT,
    "timm": AugmentConfig(policy="randaugment", op_set="timm", op_probability=0.5),
    "trivialaugment": AugmentConfig(policy="trivialaugment"),
    "three_augment": AugmentConfig(policy="three_augment"),
    "repeated": AUGMENT.model_copy(update={"repeated_aug": 3}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataConfig]:
    """One dataset as class folders, as a list, as a list with several labels, and, in another order, as shards."""
    root = tmp_path_factory.mktemp("sources")
    lines, multi_label_lines = [], []
    for number in range(NUM_IMAGES):
        path = root / "train" / f"c{number % NUM_CLASSES}" / f"{number:02d}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(40 + number, 60 - number, seed=number).save(path)
    for path in sorted(root.glob("train/*/*.jpeg")):
        label = int(path.parent.name[1:])
        lines.append(f"{path.relative_to(root)} {label}\n")
        multi_label_lines.append(f"{path.relative_to(root)} {label},{(label + 1) % NUM_CLASSES}\n")
    (root / "list.txt").write_text("".join(lines))
    (root / "several.txt").write_text("".join(multi_label_lines))
    assert main(["shards", "--root", str(root), "--out", str(root / "packed"), "--shard-mb", "0.01"]) == 0
    common = {"global_batch_size": BATCH_SIZE, "num_threads": 1}
    return {
        "folders": DataConfig(root=str(root), **common),
        "list": DataConfig(root=str(root), train="list.txt", **common),
        "several labels": DataConfig(root=str(root), train="several.txt", multi_label=True, **common),
        "shards": DataConfig(root=str(root / "packed"), **common),
    }


def train_loader(
    data: DataConfig, start_step: int = 0, rank: int = 0, num_ranks: int = 1, augment: Any = AUGMENT
) -> TrainLoader:
    return TrainLoader(
        open_set(data, "train", NUM_CLASSES),
        SIZE,
        data,
        augment,
        seed=4,
        start_step=start_step,
        dp_rank=rank,
        dp_size=num_ranks,
        device_id=None,
    )


def next_batches(loader: TrainLoader, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(images.numpy().copy(), labels.numpy().copy()) for images, labels in (next(loader) for _ in range(count))]


def assert_same(ours: list[tuple[np.ndarray, np.ndarray]], theirs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert len(ours) == len(theirs)
    for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


SOURCES = ["folders", "list", "several labels", "shards"]


def test_decoding_threads_leave_the_cores_to_training(sources: dict[str, DataConfig]) -> None:
    """All threads that DALI starts have the lowest priority; those that were there before keep theirs."""
    tasks = Path("/proc/self/task")
    before = {int(path.name) for path in tasks.iterdir()}
    priorities = {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in before}
    loader = train_loader(sources["folders"].model_copy(update={"num_threads": 2}))
    next_batches(loader, 2)
    after = {int(path.name) for path in tasks.iterdir()}
    assert sum(os.getpriority(os.PRIO_PROCESS, thread) == 19 for thread in after - before) >= 2
    assert all(os.getpriority(os.PRIO_PROCESS, thread) == priorities[thread] for thread in before & after)


@pytest.mark.parametrize("source", SOURCES)
def test_a_resume_within_an_epoch_continues_with_the_next_batch(sources: dict[str, DataConfig], source: str) -> None:
    """After any step, with any number of reader and DALI threads, beyond the end of an epoch."""
    data = sources[source]
    batches = next_batches(train_loader(data), 8)
    for start_step, num_readers, num_threads in ((1, 1, 2), (4, 7, 1), (6, 2, 3)):
        changed = data.model_copy(update={"num_readers": num_readers, "num_threads": num_threads})
        assert_same(next_batches(train_loader(changed, start_step), 8 - start_step), batches[start_step:])
    assert not np.array_equal(batches[0][0], batches[1][0])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_resumes_with_the_same_bits(sources: dict[str, DataConfig], policy: str) -> None:
    augment = POLICIES[policy]
    batches = next_batches(train_loader(sources["folders"], augment=augment), 6)
    assert_same(next_batches(train_loader(sources["folders"], 3, augment=augment), 3), batches[3:])
    plain = next_batches(train_loader(sources["folders"], augment=AugmentConfig(repeated_aug=augment.repeated_aug)), 6)
    assert not any(np.array_equal(ours[0], theirs[0]) for ours, theirs in zip(batches, plain, strict=True))


@pytest.mark.parametrize("fill", ["noise", "mean"])
def test_each_batch_has_the_size_of_its_step_however_many_are_prefetched(
    sources: dict[str, DataConfig], fill: str
) -> None:
    """At the border too, in the same order, and after a resume; the pixels are those of a loader of that size, except
    for the noise that fills erased boxes."""
    augment = AUGMENT.model_copy(update={"random_erasing_with": fill})

    def size_at(step: int) -> tuple[int, int]:
        return (16, 24) if step < 3 else SIZE

    def batches_of(size: tuple[int, int], start_step: int, count: int, prefetch: int, varies: bool) -> list[Any]:
        data = sources["folders"].model_copy(update={"prefetch_batches": prefetch})
        loader = TrainLoader(
            open_set(data, "train", NUM_CLASSES), size, data, augment, seed=4, start_step=start_step, dp_rank=0,
            dp_size=1, device_id=None, image_size_at=size_at if varies else None,
        )  # fmt: skip
        return next_batches(loader, count)

    batches = batches_of(SIZE, 0, 6, 1, True)
    assert [images.shape[2:] for images, _ in batches] == [(16, 24)] * 3 + [SIZE] * 3
    assert_same(batches_of(SIZE, 0, 6, 4, True), batches)
    assert_same(batches_of(SIZE, 2, 4, 3, True), batches[2:])
    assert_same(batches_of(SIZE, 3, 3, 2, False), batches[3:])
    small = batches_of((16, 24), 0, 3, 2, False)
    for (images, labels), (expected, expected_labels) in zip(batches[:3], small, strict=True):
        np.testing.assert_array_equal(labels, expected_labels)
        num_other_pixels = (images != expected).any(axis=1).sum()
        assert 0 < num_other_pixels < images[:, 0].size / 2 if fill == "noise" else num_other_pixels == 0


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("source", SOURCES)
def test_all_ranks_together_get_the_batches_of_one(sources: dict[str, DataConfig], source: str, num_ranks: int) -> None:
    data = sources[source]
    parts = [next_batches(train_loader(data, 2, rank, num_ranks), 4) for rank in range(num_ranks)]
    batches = [tuple(map(np.concatenate, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert_same(batches, next_batches(train_loader(data, 2), 4))


@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_has_every_image_once(sources: dict[str, DataConfig], source: str) -> None:
    """With two batches of 11 per epoch."""
    data = sources[source].model_copy(update={"global_batch_size": 11})
    plain = AugmentConfig(crop_scale=(1.0, 1.0), flip_probability=0.0)
    epochs = [next_batches(train_loader(data, start, augment=plain), 2) for start in (0, 2)]
    pixels = [sorted(image.tobytes() for images, _ in epoch for image in images) for epoch in epochs]
    assert len(set(pixels[0])) == NUM_IMAGES and pixels[0] != [image.tobytes() for image in epochs[0][0][0]]
    labels = [sorted(map(tuple, np.concatenate([row[1].reshape(11, -1) for row in epoch]))) for epoch in epochs]
    assert labels[0] == labels[1]


def labels_by_pixels(data: DataConfig) -> dict[bytes, list[float]]:
    """Return the labels of the training images by their pixels in the evaluation."""
    images = open_set(data, "train", NUM_CLASSES)
    loader = EvalLoader(images, SIZE, 5, data, EvalConfig(), dp_rank=0, dp_size=1, device_id=None)
    return {
        image.tobytes(): np.atleast_1d(label).tolist()
        for pixels, labels, weights in loader
        for image, label, weight in zip(pixels.numpy(), labels.numpy(), weights.numpy(), strict=True)
        if weight
    }


def test_folders_lists_and_shards_give_the_same_pixels(sources: dict[str, DataConfig]) -> None:
    folders = labels_by_pixels(sources["folders"])
    assert len(folders) == NUM_IMAGES
    assert labels_by_pixels(sources["list"]) == labels_by_pixels(sources["shards"]) == folders
    multi_hot = labels_by_pixels(sources["several labels"])
    assert multi_hot.keys() == folders.keys()
    for pixels, (label,) in folders.items():
        assert multi_hot[pixels] == [float(k in (label, (label + 1) % NUM_CLASSES)) for k in range(NUM_CLASSES)]


def test_several_labels_are_multi_hot(sources: dict[str, DataConfig]) -> None:
    _, labels = next(train_loader(sources["several labels"]))
    assert labels.shape == [BATCH_SIZE, NUM_CLASSES] and labels.dtype == paddle.uint8
    assert (labels.numpy().sum(axis=1) == 2).all()


DAMAGES = {
    "cut in half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"This is not an image.\n" * 20,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("source", ["list", "shards"])
def test_a_bad_image_is_named_for_every_source(tmp_path: Path, source: str, damage: str) -> None:
    for number in range(NUM_IMAGES):
        path = tmp_path / "train" / f"c{number % NUM_CLASSES}" / f"{number:02d}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(40, 60, seed=number).save(path)
    bad = tmp_path / "train/c1/07.jpeg"
    bad.write_bytes(DAMAGES[damage](bad.read_bytes()))
    root, name = tmp_path, str(bad)
    if source == "shards" and damage == "empty":
        assert (
            main(["shards", "--root", str(tmp_path), "--out", str(tmp_path / "packed")]) == 2
        )  # an empty file can't be packed
        return
    if source == "shards":
        assert main(["shards", "--root", str(tmp_path), "--out", str(tmp_path / "packed")]) == 0
        root = tmp_path / "packed"
        contents = (root / "train/contents.txt").read_text().splitlines()
        name = next(line.split()[0] for line in contents if line.endswith("07.jpeg"))
    data = DataConfig(root=str(root), global_batch_size=4, num_threads=1)
    with pytest.raises(DataError) as error:
        next_batches(train_loader(data), 8)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_the_next_batch_depends_only_on_the_position(sources: dict[str, DataConfig]) -> None:
    """A checkpoint saves a step and the settings of the order, no state of DALI or NumPy."""
    loader = train_loader(sources["folders"])
    next_batches(loader, 3)
    saved = json.dumps({"step": 3})
    np.random.seed(1)
    paddle.seed(9)
    assert_same(next_batches(train_loader(sources["folders"], json.loads(saved)["step"]), 2), next_batches(loader, 2))

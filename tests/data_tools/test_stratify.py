"""Stratified split: each class's share, groups that stay together, and the option --group-by."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers.sets import photo

from data_tools.__main__ import main
from data_tools.stratify import UserImage, divide, group_of


def make_images(rng: random.Random, counts: list[int], images_per_group: int = 1) -> list[UserImage]:
    """Return images with distinct digests; `counts`: of each class."""
    return [
        UserImage(f"{label}/{n}.jpg", label, f"{rng.getrandbits(64):016x}", f"{label} {n // images_per_group}")
        for label, count in enumerate(counts)
        for n in range(count)
    ]


@pytest.mark.parametrize("share", [0.03, 0.1, 0.25, 0.5, 0.9])
def test_validation_has_its_share_of_every_class(share: float) -> None:
    counts = [30, 30, 30, 2, 1, 7, 100]
    for seed in range(20):
        assigned: dict[str, str] = {}
        images = make_images(random.Random(seed), counts)
        actual = Counter(image.label for image in divide(images, share, assigned)["val"])
        expected = {n: min(max(1, round(share * count)), count - 1) for n, count in enumerate(counts) if count > 1}
        assert actual == expected
        assert len(assigned) == len(images)


def test_added_images_restore_the_share_and_no_image_changes_its_split() -> None:
    rng, assigned = random.Random(0), dict[str, str]()
    images = make_images(rng, [10, 40])
    before = divide(images, 0.2, assigned)
    more = [UserImage(f"new {n}.jpg", n % 2, f"{rng.getrandbits(64):016x}") for n in range(100)]
    after = divide(images + more, 0.2, assigned)
    assert Counter(image.label for image in after["val"]) == {0: 12, 1: 18}
    assert all(set(before[split]) <= set(after[split]) for split in before)


def test_groups_stay_together_and_every_class_is_in_both_splits() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        images = make_images(rng, [rng.randint(2, 60) for _ in range(5)], images_per_group=rng.randint(2, 9))
        images.append(UserImage("copy.jpg", 4, images[0].digest))  # joins a group of class 0 to class 4
        split = divide(images, 0.2, {})
        groups = {name: {image.group for image in part if image.group} for name, part in split.items()}
        assert not groups["train"] & groups["val"]
        digests = {name: {image.digest for image in part} for name, part in split.items()}
        assert not digests["train"] & digests["val"]
        num_groups = Counter(label for label, _ in {(image.label, image.group) for image in images})
        for label in range(4):
            assert any(image.label == label for image in split["train"])
            assert any(image.label == label for image in split["val"]) or num_groups[label] == 1


def test_group_by_reads_the_file_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "images"
    for label, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for n in range(12):
            path = root / name / f"patient{6 * label + n // 2}_{n}.jpg"
            photo(10, 10, seed=100 * label + n).save(path)
    command = ["folder", "--root", str(root), "--val-share", "0.3", "--group-by"]
    assert main([*command, r"^(patient\d+)_"]) == 0
    assert "24 images in 12 groups" in capsys.readouterr().out
    patients = [
        {Path(line.rpartition(" ")[0]).name.split("_")[0] for line in (root / list_name).read_text().splitlines()}
        for list_name in ("train_list.txt", "val_list.txt")
    ]
    assert not patients[0] & patients[1] and len(patients[0] | patients[1]) == 12 and len(patients[1]) == 4
    for pattern, message in (
        ("(", "is not a regular expression"),
        ("patient1", "doesn't match the names of 18 of 24 images, such as patient0_0.jpg"),
        ("patient", "no class has two different groups of images"),
        ("", "all images would be one group"),
    ):
        capsys.readouterr()
        assert main([*command, pattern]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert main(["check", str(root)]) == 0  # with the lists that are there
    assert "read 16 train and 8 val images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pattern", "name", "group"),
    [
        (r"p(\d+)", "a/p12.jpg", "12"),
        (r"p\d+", "a/p12.jpg", "p12"),
        (r"p(\d+)|.*", "a/two  spaces.jpg", "two  spaces.jpg"),
        (r"p(\d+)|(.*)", "a/other.jpg", "other.jpg"),
        (r"p(\d+)", "a/other.jpg", None),
    ],
)
def test_the_group_is_a_parenthesis_that_takes_part_or_the_whole_match(
    pattern: str, name: str, group: str | None
) -> None:
    assert group_of(name, re.compile(pattern)) == group

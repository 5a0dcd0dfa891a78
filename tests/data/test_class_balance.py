"""Weights of the classes in the loss: scikit-learn's formula, files, and mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight

from vit_static.common.errors import ConfigError, DataError
from vit_static.config.data_schema import DataConfig, LossConfig
from vit_static.config.loader import load_config
from vit_static.data.class_balance import loss_weights
from vit_static.data.image_set import FileDataset
from vit_static.data.list_file import ImageList, Labels
from vit_static.data.open_set import open_set
from vit_static.model.loss_weights import NO_WEIGHTS, LossWeights

NAMES = ["cat", "sea lion", "dog"]
LABELS = [0] * 50 + [1] * 3 + [2] * 11


def dataset(labels: Labels, names: list[str] = NAMES) -> FileDataset:
    empty = np.zeros(len(labels), np.int64)
    return FileDataset(Path("root"), ImageList(np.empty(0, np.uint8), empty, empty, labels), names)


def weights_of(labels: list[int] | Labels, **loss: str) -> LossWeights:
    labels = labels if isinstance(labels, Labels) else Labels(np.array(labels, np.int32))
    return loss_weights(LossConfig(name="sigmoid", **loss), dataset(labels))


def test_without_weights_nothing_is_computed() -> None:
    assert weights_of(LABELS) == NO_WEIGHTS


def test_balanced_class_weights_are_scikit_learns() -> None:
    weights = weights_of(LABELS, class_weights="balanced").classes
    assert weights is not None and weights.dtype == np.float32
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_allclose(weights[LABELS], compute_sample_weight("balanced", LABELS), rtol=1e-6)
    assert weights[LABELS].mean() == pytest.approx(1.0)


def test_with_several_labels_the_mean_weight_of_the_images_is_1() -> None:
    """scikit-learn's weights of all labels, scaled. Labels {0}, {0, 1}, {}, {0}, {2}."""
    labels = Labels(np.array([0, 0, 1, 0, 2], np.int32), np.array([0, 1, 3, 3, 4, 5]))
    weights = weights_of(labels, class_weights="balanced").classes
    assert weights is not None
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.values)
    np.testing.assert_allclose(weights / weights[0], expected / expected[0], rtol=1e-6)
    a, b, c = weights
    assert np.mean([a, (a + b) / 2, a, c]) == pytest.approx(1.0)


def test_balanced_pos_weights_are_negatives_by_positives() -> None:
    labels = Labels(np.array([0, 0, 1, 0, 2], np.int32), np.array([0, 1, 3, 3, 4, 5]))
    positives = weights_of(labels, pos_weight="balanced").positives
    np.testing.assert_allclose(positives, [2 / 3, 4 / 1, 4 / 1])
    np.testing.assert_array_equal(weights_of(LABELS, pos_weight="2.5").positives, [2.5] * 3)


@pytest.mark.parametrize("text", ["1\n\n2\n4\n", "dog 4\nsea lion\t2\ncat 1\n", "\ufeff1e0\r\n2\r\n4"])
def test_a_file_has_a_number_per_class_in_order_or_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "weights.txt"
    path.write_text(text, encoding="utf-8")
    weights = weights_of(LABELS, class_weights=str(path), pos_weight=str(path))
    np.testing.assert_array_equal(weights.positives, [1, 2, 4])
    np.testing.assert_allclose(weights.classes, np.array([1, 2, 4]) / ((50 + 6 + 44) / 64), rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1\n2\n", "no weight for the class 'dog'"),
        ("cat 1\ndog 2\n", "no weight for the class 'sea lion'"),
        ("1\n2\n3\n4\n", "line 4, '4': is one number too many"),
        ("1\n2\nx\n", "line 3, 'x': must end with a number above 0"),
        ("1\n2\n0\n", "line 3"),
        ("1\n2\n-1\n", "line 3"),
        ("1\n2\nnan\n", "line 3"),
        ("cat 1\ncow 2\n", "line 2, 'cow 2': must be the name of one of the 3 classes"),
        ("cat 1\n2\n", "line 2, '2': must be the name"),
        ("cat 1\ncat 2\n", "line 2, 'cat 2': is the second weight"),
        ("", "no weight for the class 'cat'"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "weights.txt"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        weights_of(LABELS, class_weights=str(path))
    assert str(path) in str(error.value) and problem in str(error.value) and "\n" not in str(error.value)


def test_mistakes_are_one_line_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn 1\n")
    for labels, loss, problem in (
        (LABELS, {"class_weights": "ballanced"}, "loss.class_weights = ballanced: can't be read"),
        (LABELS, {"pos_weight": str(tmp_path)}, "can't be read"),
        (LABELS, {"pos_weight": str(tmp_path / "latin.txt")}, "not UTF-8"),
        ([0, 0, 2], {"class_weights": "balanced"}, "'sea lion' has no training image"),
        ([0, 0, 2], {"pos_weight": "balanced"}, "'sea lion' has no training image"),
    ):
        with pytest.raises((ConfigError, DataError), match=problem) as error:
            weights_of(labels, **loss)
        assert "\n" not in str(error.value)
    everywhere = Labels(np.array([0, 1, 0, 2], np.int32), np.array([0, 2, 4]))
    with pytest.raises(ConfigError, match="all training images have the class 'cat'"):
        weights_of(everywhere, pos_weight="balanced")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (["loss.pos_weight=2"], "pos_weight=.*: needs independent classes"),
        (["loss.pos_weight=balanced"], "pos_weight=.*: needs independent classes"),
        (["loss.name=bce", "loss.pos_weight=0"], r"pos_weight=0: must be above 0"),
        (["loss.name=bce", "loss.pos_weight=inf"], "must be above 0"),
        (["loss.focal_gamma=-1"], "loss.focal_gamma=-1: must be at least 0"),
        (["data.sampler=balanced", "loss.class_weights=balanced"], "loss.class_weights are both balanced"),
        (["data.sampler=balanced", "loss.name=bce", "loss.pos_weight=balanced"], "loss.pos_weight are both balanced"),
        (["data.sampler=ballanced"], "data.sampler=ballanced: must be 'shuffle' or 'balanced'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(override: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(None, override)


def test_the_classes_of_folders_are_weighted_by_their_images(make_set) -> None:
    data: DataConfig = make_set({f"train/{name}.png": b"x" for name in ("a/1", "a/2", "a/3", "b/1")})
    weights = loss_weights(LossConfig(class_weights="balanced"), open_set(data, "train", 2))
    np.testing.assert_allclose(weights.classes, [4 / 6, 2], rtol=1e-6)

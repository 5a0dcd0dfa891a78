"""Further validation sets: which layouts are recognized, how predictions are counted, and a run that evaluates them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import metrics
from helpers.sets import photo

from vit_static.common.errors import DataError
from vit_static.config.data_schema import DataConfig
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.data.extra_sets import ALEXNET_ERRORS, ExtraSet, mean_corruption_errors, open_extra_sets
from vit_static.data.open_set import open_set
from vit_static.report.run_log import read_run
from vit_static.train.extra_eval import top_hits
from vit_static.train.trainer import train

WNIDS = ("n01440764", "n01443537", "n02113799")


def open_one(make_set: Any, path: str, *files: str) -> ExtraSet:
    """Open a further set of a data set with three classes, each with one image."""
    image = photo(30, 30)
    folders = [f"{split}/{wnid}/1.jpeg" for split in ("train", "val") for wnid in WNIDS]
    data: DataConfig = make_set(dict.fromkeys([*folders, *files], image))
    (extra,) = open_extra_sets({"one": str(Path(data.root) / path)}, data, open_set(data, "val", 3))
    return extra


def labels_of(extra: ExtraSet, part: str = "") -> list[int]:
    return [int(extra.parts[part].read(index)[1][0]) for index in range(len(extra.parts[part]))]


def test_folders_of_all_classes_are_labelled_by_their_names(make_set: Any) -> None:
    extra = open_one(make_set, "sketch", *(f"sketch/{wnid}/{n}.png" for wnid in WNIDS for n in range(2)))
    assert labels_of(extra) == [0, 0, 1, 1, 2, 2] and extra.classes is None and not extra.is_corrupted


def test_folders_of_some_classes_restrict_the_predictions(make_set: Any) -> None:
    extra = open_one(make_set, "a", f"a/{WNIDS[2]}/1.jpeg", f"a/{WNIDS[0]}/1.jpeg")
    assert labels_of(extra) == [0, 2] and extra.classes is not None and extra.classes.tolist() == [0, 2]


def test_numbered_folders_are_those_of_imagenet_v2(make_set: Any) -> None:
    extra = open_one(make_set, "v2", *(f"v2/{label}/1.jpeg" for label in range(3)))
    assert labels_of(extra) == [0, 1, 2] and extra.classes is None


@pytest.mark.parametrize("group", ["", "weather/"])
def test_corruptions_and_severities_are_parts(make_set: Any, group: str) -> None:
    files = [f"c/{group}{kind}/{n}/{wnid}/1.jpeg" for kind in ("fog", "snow") for n in (1, 5) for wnid in WNIDS]
    extra = open_one(make_set, "c", *files)
    assert sorted(extra.parts) == ["fog/1", "fog/5", "snow/1", "snow/5"] and extra.is_corrupted
    assert extra.num_images == 12 and labels_of(extra, "snow/5") == [0, 1, 2]


def test_a_folder_of_other_classes_is_refused_by_name(make_set: Any) -> None:
    for path, expected in (("wrong", "n99999999"), ("nowhere", "no such folder")):
        with pytest.raises(DataError, match=rf"eval\.also\.one: .*{expected}") as error:
            open_one(make_set, path, "wrong/n99999999/1.jpeg", f"wrong/{WNIDS[0]}/1.jpeg")
        assert "\n" not in str(error.value)


def test_the_mean_corruption_error_is_relative_to_alexnets() -> None:
    """A model with AlexNet's errors has an mCE of 1, one with half of them 1/2."""
    alexnet = {
        f"{name}/{severity}": 1.0 - error + 0.01 * (severity - 3)
        for name, error in ALEXNET_ERRORS.items()
        for severity in range(1, 6)
    }
    mean_error, mce = mean_corruption_errors(alexnet)
    assert mce == pytest.approx(1.0, rel=1e-12) and mean_error == pytest.approx(np.mean(list(ALEXNET_ERRORS.values())))
    half = {part: 1.0 - 0.5 * (1.0 - accuracy) for part, accuracy in alexnet.items()}
    assert mean_corruption_errors(half)[1] == pytest.approx(0.5, rel=1e-12)
    mean_error, mce = mean_corruption_errors({"fog/1": 0.5, "fog/2": 0.3, "snow/1": 0.8})
    assert mean_error == pytest.approx(0.4) and mce is None


def test_hits_are_those_of_sorted_scores() -> None:
    random = np.random.default_rng(0)
    logits = np.round(random.normal(size=(200, 12)), 1)
    labels = random.integers(0, 12, 200)
    several = np.zeros((200, 12), np.uint8)
    several[np.arange(200), labels] = several[np.arange(200), random.integers(0, 12, 200)] = 1
    classes = np.array([1, 3, 4, 7, 8, 9, 11])
    for allowed, given in ((None, labels), (classes, labels), (None, several)):
        for row, label, hits in zip(logits, given, top_hits(logits, given, allowed), strict=True):
            ranked = sorted(range(12) if allowed is None else allowed.tolist(), key=lambda n: (-row[n], n))
            correct = {int(label)} if np.ndim(label) == 0 else set(np.flatnonzero(label).tolist())
            assert hits.tolist() == [ranked[0] in correct, bool(correct & set(ranked[:5]))]
    logits[0, 5] = np.nan
    assert not top_hits(logits, several, None)[0].any()


def test_a_run_evaluates_and_reports_each_set(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the images and labels of the validation set, ReaL's file and a folder give its top-1 and top-5."""
    val = Path(config.data.root) / "val"
    named = tmp_path / "digits"
    shutil.copytree(Path(config.data.root) / "train", named / "train")
    labels = []
    for number, path in enumerate(sorted(val.glob("*/*")), 1):
        target = named / "val" / path.parent.name / f"ILSVRC2012_val_{number:08d}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        labels.append([int(path.parent.name)])
    (tmp_path / "real.json").write_text(json.dumps(labels))
    for digit in ("3", "7"):
        shutil.copytree(val / digit, tmp_path / "some" / digit)
        shutil.copytree(val / digit, tmp_path / "c/fog/1" / digit)
    also = {"real": tmp_path / "real.json", "same": val, "some": tmp_path / "some", "c": tmp_path / "c"}
    text = ", ".join(f"{name}: {path}" for name, path in also.items())
    overrides = [f"data.root={named}", f"output_dir={tmp_path}/output", f"eval.also={{{text}}}", "train.max_steps=8"]
    assert train(load_config(tmp_path / "tiny.yaml", overrides))
    run = tmp_path / "output/tiny"
    (main,) = metrics(run, "eval")
    by_name = {line["set"]: line for line in metrics(run, "eval_also")}
    assert by_name.keys() == also.keys()
    for name in ("real", "same"):
        assert {key: by_name[name][key] for key in ("top1", "top5", "num_images")} == {
            key: pytest.approx(main[key]) for key in ("top1", "top5", "num_images")
        }
    some, corrupted = by_name["some"], by_name["c"]
    assert (some["num_images"], some["num_classes"], some["top5"]) == (6, 2, 100.0)
    assert corrupted["num_images"] == 6 and corrupted["mean_error"] == pytest.approx(100.0 - corrupted["top1"])
    output = capsys.readouterr().out
    assert "    some: top-1" in output and "among 2 classes" in output and "not divided by AlexNet's" in output
    page = (run / "report.html").read_text()
    assert "Other validation sets" in page and page.count('<td class="text">real</td>') == 1
    assert read_run(run).extra_evaluations["same"][-1]["top1"] == pytest.approx(main["top1"])

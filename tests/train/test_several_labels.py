"""A run on images with several labels, stopped early on two ranks, resumed on one, exported with thresholds."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.digit_pairs import make_digit_pairs
from helpers.forked_launch import run_forked_launch
from helpers.forked_verbs import run_verb
from helpers.runs import event_names, metrics
from helpers.tiny import tiny_model
from sklearn.metrics import average_precision_score, f1_score

from vit_static.report.class_quality import ClassQuality, write_class_quality
from vit_static.report.error_analysis import ErrorAnalysis

CONFIG = (
    tiny_model(image_size=[16, 32], head_bias_init=-1.5)
    + """
data: {root: pairs, train: train.txt, val: val.txt, multi_label: true, global_batch_size: 16, num_threads: 1}
augment: {crop_scale: [0.9, 1.0], crop_aspect_ratio: [1.9, 2.1], flip_probability: 0.0}
loss: {name: bce}
optim: {lr: 3e-3}
train: {epochs: 6, patience: 1, min_delta: 100}
eval: {resize: direct, every_epochs: 2, threshold: 0.4}
log: {trackers: []}
export: {temperature: fit}
"""
)
SHARES = ("top1", "map", "macro_f1", "micro_f1", "micro_precision", "micro_recall", "ece")


@pytest.mark.slow
def test_two_ranks_a_resume_and_an_export_agree_on_several_labels(tmp_path: Path, small_digits: Path) -> None:
    make_digit_pairs(small_digits, tmp_path / "pairs", {"train": 64, "val": 41})
    (tmp_path / "pairs.yaml").write_text(CONFIG)
    trained = run_forked_launch("pretrain", "-c", "pairs.yaml", cwd=tmp_path, NPROC="2")
    assert trained.returncode == 0, trained.stderr
    assert "stopped early after epoch 4: mAP has not improved by more than 100" in trained.stdout
    run = tmp_path / "output/pairs"
    on_two = metrics(run, "eval")
    assert [line["step"] for line in on_two] == [8, 16] and all(line["num_images"] == 41 for line in on_two)
    analysis = ErrorAnalysis.model_validate_json((run / "evaluation.json").read_bytes())
    assert analysis.per_class is not None and analysis.calibration is not None
    precisions = [each.average_precision for each in analysis.per_class if each.average_precision is not None]
    assert on_two[-1]["map"] == pytest.approx(100.0 * np.mean(precisions), rel=1e-9)
    assert f"mAP {on_two[-1]['map']:.2f} %" in trained.stdout.splitlines()[-1]  # the default of eval.metric
    assert event_names(run) == ["early stop", "finished"]

    # The second half again, on one rank: the same evaluation as far as float32's rounding allows, and the same end.
    shutil.rmtree(run / "checkpoints/step_00000016")
    resumed = run_verb("pretrain", "-c", "pairs.yaml", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert event_names(run) == ["early stop", "finished", "resumed", "early stop", "finished"]
    on_one = metrics(run, "eval")[-1]
    assert on_one["step"] == 16 and on_one["loss"] == pytest.approx(on_two[-1]["loss"], rel=1e-4)
    for name in SHARES:
        assert on_one[name] == pytest.approx(on_two[-1][name], abs=2.5), name

    # The metrics are scikit-learn's, computed from the predictions of the exported model.
    exported = run_verb("export", "--checkpoint", "output/pairs", "--weights", "last", "--out", "model", cwd=tmp_path)
    assert exported.returncode == 0 and "a threshold per class" in exported.stdout, exported.stderr
    spec = json.loads((tmp_path / "model/vit_static.json").read_text())
    thresholds, temperature = np.array(spec["thresholds"]), spec["temperature"]
    assert len(thresholds) == 10 and temperature != 1.0
    listed = [line.rsplit(" ", 1) for line in (tmp_path / "pairs/val.txt").read_text().splitlines()]
    is_label = np.zeros((41, 10), bool)
    for row, (_, labels) in zip(is_label, listed, strict=True):
        row[[int(label) for label in labels.split(",")]] = True
    paths = [f"pairs/{path}" for path, _ in listed]
    everything = run_verb("predict", "--model", "model", "--top-k", 10, *paths, cwd=tmp_path)
    probabilities = np.zeros((41, 10))
    for row, line in zip(probabilities, everything.stdout.splitlines(), strict=True):
        for entry in json.loads(line)["top"]:
            row[entry["class"]] = entry["probability"]
    occurring = is_label.any(axis=0)
    expected_map = np.mean(
        [average_precision_score(is_label[:, n], probabilities[:, n]) for n in np.flatnonzero(occurring)]
    )
    assert on_one["map"] == pytest.approx(100.0 * expected_map, abs=0.5)  # predict rounds to 6 digits
    logits = temperature * np.log(probabilities / (1.0 - probabilities))
    for average in ("macro", "micro"):
        is_predicted = logits >= np.log(0.4 / 0.6)
        expected_f1 = f1_score(is_label[:, occurring], is_predicted[:, occurring], average=average, zero_division=0)
        assert on_one[f"{average}_f1"] == pytest.approx(100.0 * expected_f1, abs=3.0)

    # Without --top-k, every class that reaches its threshold is returned, and these have a higher F1.
    chosen = run_verb("predict", "--model", "model", *paths, cwd=tmp_path)
    returned = [{entry["class"] for entry in json.loads(line)["top"]} for line in chosen.stdout.splitlines()]
    expected = [set(np.flatnonzero(row >= thresholds - 1e-6).tolist()) for row in probabilities]
    assert returned == expected and len({len(classes) for classes in returned}) > 1
    with_thresholds = f1_score(is_label, probabilities >= thresholds, average="macro", zero_division=0)
    assert with_thresholds > f1_score(is_label, probabilities >= 0.5, average="macro", zero_division=0)


def test_the_quality_of_each_class_is_written_as_csv(tmp_path: Path) -> None:
    quality = ClassQuality(label=0, name='tench, "big"', support=3, precision=0.5, recall=2 / 3, f1=4 / 7)
    write_class_quality([quality], tmp_path / "classes.csv")
    (row,) = csv.DictReader((tmp_path / "classes.csv").open(newline=""))
    assert row == {
        "label": "0", "name": 'tench, "big"', "support": "3",
        "precision": "0.5", "recall": str(2 / 3), "f1": str(4 / 7),
    }  # fmt: skip
    quality = quality.model_copy(update={"average_precision": 0.25})
    write_class_quality([quality, quality.model_copy(update={"average_precision": None})], tmp_path / "classes.csv")
    rows = list(csv.DictReader((tmp_path / "classes.csv").open(newline="")))
    assert [row["average_precision"] for row in rows] == ["0.25", ""]

"""What the page of a run shows and leaves out: top-5, classes with errors, the MFU, links to checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from vit_static.report.error_analysis import (
    EVALUATION_FILE,
    Sample,
    analyze_errors,
    example_images,
    worst_images,
)
from vit_static.report.page import write_report
from vit_static.report.predictions import Predictions

STARTED = {"kind": "event", "step": 0, "event": "started", "total_steps": 4, "train_flops_per_image": 2_000_000_000}
EVAL = {"kind": "eval", "step": 4, "epoch": 1.0, "top1": 75.0, "top5": 97.0, "loss": 0.5, "num_images": 4}


def body_of_report(run_dir: Path, entries: list[dict[str, Any]], num_classes: int = 10) -> str:
    """Return the HTML of the page without Bokeh's scripts."""
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (run_dir / "config.yaml").write_text(f"name: synthetic\nmodel: {{num_classes: {num_classes}}}\n")
    return write_report(run_dir).read_text().rsplit("<body>", 1)[1]


@pytest.mark.parametrize(("num_classes", "is_shown"), [(5, False), (6, True)])
def test_top5_is_shown_with_more_than_five_classes(tmp_path: Path, num_classes: int, is_shown: bool) -> None:
    body = body_of_report(tmp_path, [STARTED, EVAL], num_classes)
    assert ("97.00" in body, "curve-eval-top5" in body, "top-5 %" in body) == (is_shown,) * 3
    assert "75.00" in body and "curve-eval-top1" in body


def predictions_of(labels: list[int], classes: list[int]) -> Predictions:
    wrong = np.array(labels) != np.array(classes)
    losses, probabilities = np.where(wrong, 3.0, 0.1), np.linspace(0.5, 0.9, len(labels))
    return Predictions(losses, wrong.astype(np.int64), np.array(classes), probabilities, np.array(labels))


def body_with_errors(run_dir: Path, labels: list[int], classes: list[int]) -> str:
    predictions = predictions_of(labels, classes)
    worst = worst_images(predictions)
    samples, examples = (
        [Sample(f"val/image_{number}.png", None, np.array([labels[number]])) for number in numbers]
        for numbers in (worst, example_images(predictions, worst))
    )
    names = ["ant", "bee", "cat"]
    analyze_errors(predictions, names, 3, samples, 4, False, examples=examples).write(run_dir / EVALUATION_FILE)
    return body_of_report(run_dir, [STARTED, EVAL], 3)


def test_classes_are_listed_as_the_worst_only_if_something_is_wrong(tmp_path: Path) -> None:
    body = body_with_errors(tmp_path, [0, 0, 1, 1, 2], [0, 0, 1, 1, 2])
    assert "all 5 images are classified correctly" in body
    assert not any(text in body for text in ("Classes with the lowest", "Most frequent confusions", "Misclassified"))
    body = body_with_errors(tmp_path, [0, 0, 1, 1, 2], [0, 0, 1, 2, 2])
    assert "1 of 5 images are misclassified" in body
    worst_classes = body.split("Classes with the lowest accuracy")[1].split("</table>")[0]
    assert "bee" in worst_classes and "50.0" in worst_classes and "ant" not in worst_classes
    # Precision, recall and F1 of each class: of the three images predicted as cat or bee, one is wrong.
    quality = body.split("Quality by class")[1].split("</table>")[0]
    rows = [row.replace("</td>", "").split("<td>") for row in quality.split('<td class="text">')[1:]]
    figures = {row[0]: [float(cell.split("<")[0]) for cell in row[1:]] for row in rows}
    assert figures == {
        "ant": [100.0, 100.0, 100.0, 2],
        "bee": [100.0, 50.0, 66.7, 2],
        "cat": [50.0, 100.0, 66.7, 1],
    }
    # Next to the wrong image: the most confident correct ones of its class and of the class that it is mistaken for.
    gallery = body.split('class="gallery"')[1].split("<h2>")[0]
    assert [text.split("<")[0] for text in gallery.split("correct: ")[1:]] == ["bee", "cat"]
    assert gallery.count("val/image_") == 3
    assert all(f'title="val/image_{number}.png"' in gallery for number in (2, 4))


def test_the_mfu_is_shown_where_the_peak_rate_is_known(tmp_path: Path) -> None:
    def steps(mfu: float | None) -> list[dict[str, Any]]:
        speeds = {1: 1.0, 2: 400.0, 3: 500.0, 4: 900.0}  # the first step compiles
        return [{"kind": "train", "step": step, "images_per_s": speed, "mfu": mfu} for step, speed in speeds.items()]

    body = body_of_report(tmp_path, [STARTED, *steps(0.41)])
    assert "<dt>median MFU</dt><dd>41.0 %</dd>" in body and "curve-train-mfu" in body
    assert "<dt>median images per second</dt><dd>500</dd>" in body and "no MFU" not in body
    body = body_of_report(tmp_path, [STARTED, *steps(None)])
    assert "500 images per second, or 1.0 TFLOP/s. There is no MFU" in body and "curve-train-mfu" not in body
    assert "<dt>median MFU</dt>" not in body


def test_checkpoints_are_linked(tmp_path: Path) -> None:
    """From wherever the page is, whatever the names of folders are."""
    run_dir = tmp_path / 'run #1 & "two"?%20'
    for name in ("step_00000002", "step_00000004"):
        (run_dir / "checkpoints" / name).mkdir(parents=True)
    (run_dir / "checkpoints" / "latest").symlink_to("step_00000004")
    (run_dir / "checkpoints" / "best").symlink_to("step_00000002")
    (run_dir / "model.pdparams").touch()
    body_of_report(run_dir, [STARTED, EVAL])
    for path in (run_dir / "report.html", tmp_path / "pages" / "one.html"):
        text = write_report(run_dir, path).read_text().rsplit("<body>", 1)[1]
        urls = [part.split('"')[0] for part in text.split('<a href="')[1:]]
        targets = [(path.parent / unquote(url)).resolve() for url in urls]
        folder = run_dir / "checkpoints"
        assert targets == [folder / "step_00000004", folder / "step_00000002", run_dir / "model.pdparams"]
        assert all(not set(url) & set(' #?"&') for url in urls)
    rows = text.split("<h2>Checkpoints</h2>")[1].split("<h2>")[0].split("<tr>")[2:]
    assert ["latest" in row for row in rows] == [True, False, False] and "best" in rows[1] and "75.00 %" in rows[0]

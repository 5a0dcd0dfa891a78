"""The report of a run: curves match the log, errors match the model, and every text is escaped."""

from __future__ import annotations

import base64
import io
import json
import math
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers.exported import in_inference_process, predict
from helpers.runs import TINY, event_names, metrics
from PIL import Image

from vit_static.__main__ import main
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.export.exporter import export_checkpoint
from vit_static.report import charts
from vit_static.report.curves import CURVES
from vit_static.report.error_analysis import (
    EVALUATION_FILE,
    MAX_IMAGES,
    ErrorAnalysis,
    Sample,
    analyze_errors,
    worst_images,
)
from vit_static.report.page import write_comparison, write_report
from vit_static.report.predictions import Predictions
from vit_static.report.run_log import SPEED_KEYS, read_run
from vit_static.train.run_info import gpu_driver
from vit_static.train.trainer import train


class Page(HTMLParser):
    """A page as a program reads it: chart data, images and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.data: dict[str, Any] = {}  # of the charts, and of the page, by id
        self.descriptions: dict[str, str] = {}  # of the charts, for screen readers
        self.scripts: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[str] = []
        self.text = ""
        self._open_tags: list[str] = []
        self._description, self._id = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags[tag] += 1
        self.attributes += values
        self._open_tags.append(tag)
        if tag == "figure":
            self._description = values.get("aria-label", "")
        elif tag == "script":
            self._id = values.get("id", "")
        elif tag == "img":
            self.sources.append(values["src"])
        elif tag == "a":
            self.links.append(values["href"])

    def handle_endtag(self, tag: str) -> None:
        while self._open_tags and self._open_tags.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag = self._open_tags[-1] if self._open_tags else ""
        if tag == "script" and self._id:
            self.data[self._id], self.descriptions[self._id] = json.loads(data), self._description
        elif tag == "script":
            self.scripts.append(data)
        elif tag != "style":
            self.text += data + "\n"

    def points(self, name: str, number: int = 0) -> list[tuple[int, float]]:
        """Return the points of a line of a chart."""
        line = self.data[name]["lines"][number]
        return list(zip(line["steps"], line["values"], strict=True))


class Finished(NamedTuple):
    config: Config
    page: Page


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Finished:
    """A short run that has learned something, with an evaluation every epoch."""
    base = tmp_path_factory.mktemp("report")
    (base / "tiny.yaml").write_text(TINY)
    overrides = [f"data.root={small_digits}", f"output_dir={base}", "optim.lr=3e-3", "train.epochs=8", "amp.level=O0"]
    config = load_config(base / "tiny.yaml", [*overrides, "log.every_steps=1", "checkpoint.every_steps=null"])
    assert train(config)
    return Finished(config, Page((config.run_dir / "report.html").read_text()))


@pytest.mark.parametrize(("title", "kind", "key"), CURVES)
def test_a_chart_has_the_logged_values(finished: Finished, title: str, kind: str, key: str) -> None:
    logged = [(line["step"], line[key]) for line in metrics(finished.config.run_dir, kind) if line.get(key) is not None]
    name = f"curve-{kind}-{key}"
    if not logged:  # the peak rate of a CPU is unknown, and there is one label per image
        assert key in ("mfu", "map") and name not in finished.page.data
        return
    if key in SPEED_KEYS:
        assert logged.pop(0)[0] == 1  # this step compiles the program, so its speed would only stretch the axis
    assert finished.page.data[name]["title"] == title and title in finished.page.descriptions[name]
    np.testing.assert_allclose(finished.page.points(name), logged, rtol=1e-6)


def test_the_timeline_has_the_logged_times(finished: Finished) -> None:
    """It lets the charts be drawn over epochs, wall time and relative progress."""
    (run,) = finished.page.data["page"]["runs"]
    logged = {line["step"]: (line["seconds"], line["epoch"]) for line in metrics(finished.config.run_dir, "train")}
    timeline = run["timeline"]
    for step, *times in zip(timeline["steps"], timeline["seconds"], timeline["epochs"], strict=True):
        assert times == pytest.approx(logged.get(step, (0.0, 0.0)))
    assert timeline["steps"] == list(range(run["total_steps"] + 1))
    assert run["total_steps"] == max(logged)


def test_confusions_are_those_of_the_exported_model(finished: Finished, small_digits: Path, tmp_path: Path) -> None:
    """They are counted one by one from the predictions of Paddle Inference for each validation image."""
    run = finished.config.run_dir
    in_inference_process(export_checkpoint, None, run / "model.pdparams", tmp_path / "model", [])
    paths = sorted((small_digits / "val").glob("*/*"))
    all_predictions = in_inference_process(predict, tmp_path / "model", paths, 10)
    analysis = ErrorAnalysis.model_validate_json((run / EVALUATION_FILE).read_bytes())
    labels = [int(path.parent.name) for path in paths]
    pairs = Counter((label, one.classes[0]) for label, one in zip(labels, all_predictions, strict=True))
    wrong = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    assert 0 < wrong.total() < len(paths)
    assert analysis.matrix == [[pairs[label, predicted] for predicted in range(10)] for label in range(10)]
    assert {(one.label, one.predicted): one.num_images for one in analysis.confusions} == dict(wrong)
    counts = [one.num_images for one in analysis.confusions]
    assert counts == sorted(counts, reverse=True)
    assert {one.label: one.num_correct for one in analysis.classes} == {n: pairs[n, n] for n in range(10)}
    assert (analysis.num_images, analysis.num_correct) == (30, 30 - wrong.total())
    by_path = {str(path.relative_to(small_digits)): one for path, one in zip(paths, all_predictions, strict=True)}
    for image in analysis.images:
        prediction, (label,) = by_path[image.path], image.labels
        assert (image.predicted, label) == (prediction.classes[0], int(Path(image.path).parent.name))
        assert image.probability == pytest.approx(prediction.probabilities[0], rel=1e-3)
        probability_of_label = prediction.probabilities[prediction.classes.index(label)]
        assert image.loss == pytest.approx(-math.log(probability_of_label), rel=1e-3)
        with Image.open(io.BytesIO(base64.b64decode(image.thumbnail))) as thumbnail:
            assert thumbnail.size == (80, 80)
    losses = [image.loss for image in analysis.images]
    assert losses == sorted(losses, reverse=True) and len(losses) == min(wrong.total(), MAX_IMAGES)


def test_the_page_shows_errors_config_and_environment(finished: Finished) -> None:
    page, run = finished.page, finished.config.run_dir
    analysis = ErrorAnalysis.model_validate_json((run / EVALUATION_FILE).read_bytes())
    examples = {image.label: image for image in analysis.examples}
    shown = []
    for image in analysis.images:
        both = [label for label in (*image.labels, image.predicted) if label in examples]
        shown += [image.thumbnail, *(examples[label].thumbnail for label in both)]
    assert page.sources == [f"data:image/jpeg;base64,{thumbnail}" for thumbnail in shown] and examples
    for image in analysis.images:
        assert image.path in page.text
    (started,) = [line for line in metrics(run, "event") if line["event"] == "started"]
    assert started["mesh"]["world_size"] == 1 and started["mesh"]["precision"] == "O0 float32"
    for fact in (started["environment"]["cpu"], started["environment"]["paddle"], started["time"], "O0 float32"):
        assert f"{fact}\n" in page.text
    assert "model.mlp_dim\n64\nnull\n" in page.text and "optim.lr\n0.003\n0.001\n" in page.text
    assert "finished" in page.text and "optim.weight_decay\n" not in page.text
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert not {"xlink:href", "srcset"} & set(page.attributes)
    assert page.tags["script"] == len(page.data) + 3  # two of Bokeh's and one of ours
    assert page.data["page"]["refresh_s"] is None
    # The links to checkpoints are relative, and lead to something.
    checkpoints = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    weights = [run / name for name in ("model.pdparams", "model_best.pdparams") if (run / name).is_file()]
    assert page.links == [str(path.relative_to(run)) for path in (*checkpoints, *weights)] and weights
    assert "latest, best\n" in page.text or ("latest\n" in page.text and "best\n" in page.text)


def test_correct_examples_are_correct(finished: Finished) -> None:
    """The example of a class is of this class, and predicted as such: not one of the misclassified images."""
    analysis = ErrorAnalysis.model_validate_json((finished.config.run_dir / EVALUATION_FILE).read_bytes())
    wrong = {image.path for image in analysis.images}
    needed = {label for image in analysis.images for label in (*image.labels, image.predicted)}
    assert {image.label for image in analysis.examples} == {n for n in needed if analysis.matrix[n][n]}
    for image in analysis.examples:
        assert int(Path(image.path).parent.name) == image.label and image.path not in wrong and image.thumbnail


def test_the_page_of_a_long_run_is_small_and_shows_every_extreme(tmp_path: Path) -> None:
    """The run has 300,000 steps, and logs every 10."""
    rng = np.random.default_rng(0)
    steps = np.arange(10, 300_001, 10)
    values = 1.0 + rng.normal(0, 0.1, len(steps))
    keys = [key for _, kind, key in CURVES if kind == "train"]
    entries = [{"kind": "event", "step": 0, "event": "started", "total_steps": 300_000}] + [
        {"kind": "train", "step": step, **dict.fromkeys(keys, value)}
        for step, value in zip(steps.tolist(), values.tolist(), strict=True)
    ]
    write_log(tmp_path, entries)
    started = time.perf_counter()
    page = Page(write_report(tmp_path).read_text())
    assert time.perf_counter() - started < 10
    library = sum(map(len, page.scripts))
    assert library < 1_500_000 and (tmp_path / "report.html").stat().st_size < library + 1_000_000
    line = page.data["curve-train-loss"]["lines"][0]
    value_of_step, mean_of_step = (dict(zip(line["steps"], line[key], strict=True)) for key in ("values", "means"))
    assert len(value_of_step) <= 2 * charts.MAX_COLUMNS + 2
    columns = ((steps - 10) * (charts.MAX_COLUMNS / (300_000 - 10))).astype(int).clip(max=charts.MAX_COLUMNS - 1)
    for column in np.split(np.arange(len(steps)), np.flatnonzero(np.diff(columns)) + 1):
        for extreme in (values[column].min(), values[column].max()):
            step = int(steps[np.flatnonzero(values == extreme)[0]])
            assert value_of_step[step] == pytest.approx(extreme, rel=1e-6)
            assert mean_of_step[step] == pytest.approx(values[column].mean(), rel=1e-6)


def write_log(run_dir: Path, entries: list[dict[str, Any]], config: str = "name: synthetic\n") -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (run_dir / "config.yaml").write_text(config)


def test_undone_steps_are_not_shown_and_rewinds_are_marked(tmp_path: Path) -> None:
    """The run is killed after its checkpoint, resumes on another mesh, and is rolled back once."""

    def line(step: int, loss: float | None, seconds: float) -> dict[str, Any]:
        return {"kind": "train", "step": step, "loss": loss, "lr": 1.0, "seconds": seconds, "memory_mb": 10.0 * step}

    mesh = {"dp": 1, "device": "cpu"}
    write_log(
        tmp_path,
        [
            {"kind": "train", "step": 500, "loss": 99.0},  # of an earlier run in the same folder
            {"kind": "event", "step": 0, "event": "started", "mesh": mesh, "time": "at eight"},
            line(1, 8.0, 1.0), line(2, 7.0, 2.0), line(3, 6.0, 3.0),
            {"kind": "event", "step": 2, "event": "resumed", "mesh": mesh | {"dp": 2}, "time": "at nine"},
            line(4, 5.0, 10.0), line(5, None, 11.0), line(6, 4.0, 12.0),
            {"kind": "event", "step": 4, "event": "rolled back", "nonfinite_step": 7},
            line(7, 3.0, 15.0),
        ],
    )  # fmt: skip
    page = Page(write_report(tmp_path).read_text())
    assert page.points("curve-train-loss") == [(1, 8.0), (2, 7.0), (4, 5.0), (7, 3.0)]
    assert page.data["curve-train-loss"]["marks"] == [[2, "resumed", False], [4, "rolled back", True]]
    timeline = page.data["page"]["runs"][0]["timeline"]
    assert timeline == {"steps": [0, 1, 2, 4, 7], "seconds": [0.0, 1.0, 2.0, 13.0, 18.0], "epochs": None}
    assert "dp\n1\n2\n" in page.text and "at eight\nat nine\n" in page.text
    assert "wall time\n18 s\n" in page.text and "70 MB" in page.text  # 3 and 15 seconds, including undone steps
    assert "running or killed: the log has no end" in page.text


ODD = "</script><script>alert(1)</script><img src=x onerror=\"alert('&amp;')\">\x00\ud800"


def test_every_text_is_escaped(tmp_path: Path) -> None:
    analysis = analyze_errors(
        Predictions(
            np.array([3.0, np.nan]), np.array([1, 9]), np.array([1, 1]), np.array([0.5, np.nan]), np.array([0, 0])
        ),
        [f"<b>{ODD[:-1]}", f"'\"><i>{ODD[:-1]}"],
        2,
        [Sample(f"val/<u>{ODD[:-1]}.jpeg", None, np.array([0])), Sample(f"<s>{ODD[:-1]}", None, None)],
        5,
        False,
    )
    entries = [
        {
            "kind": "event",
            "step": 0,
            "event": "started",
            "time": ODD,
            "mesh": {ODD: ODD},
            "environment": {"cpu": [ODD]},
        },
        {"kind": "train", "step": 5, "loss": 1.0, ODD: ODD},
        {"kind": "train", "step": 6, "loss": "<b>", "lr": True, "memory_mb": [1]},
        {"kind": "eval", "step": 5, "epoch": ODD, "top1": 50.0, "top5": "<b>", "num_images": 2},
        {"kind": "event", "step": 6, "event": ODD},
        {"kind": "event", "step": 6, "event": ["<b>"]},
    ]
    for name in ("a", "b<i>'\"&"):
        write_log(
            tmp_path / name, entries, f"name: x\ndata: {{root: {json.dumps(ODD[:-2])}}}\n{name!r}: {{'<b>': 1}}\n"
        )
        analysis.write(tmp_path / name / EVALUATION_FILE)
    texts = [write_report(tmp_path / name).read_text() for name in ("a", "b<i>'\"&")]
    texts.append(write_comparison([tmp_path / "a", tmp_path / "b<i>'\"&"], tmp_path / "two.html").read_text())
    # The comparison links to the runs' own pages.
    assert '<a href="a/report.html">a</a>' in texts[-1] and '<a href="b%3Ci%3E%27%22%26/report.html">b&lt;' in texts[-1]
    for text in texts:
        page = Page(text)
        assert not {"b", "i", "u", "s"} & set(page.tags) - {"b"} and "onerror" not in page.attributes
        assert page.tags["script"] == len(page.data) + 3 > 4 and page.sources == []
        assert page.tags["b"] in (0, 4)  # those of the template, for two images
        assert "alert(1)" in page.text


def test_runs_are_compared_on_one_page(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished.config.run_dir
    other = tmp_path / "other"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "eval":
            line |= {"ema_top1": 0.5 * line["top1"], "ema_loss": 3.0, "ema_top5": 1.0}
    write_log(other, lines, (run / "config.yaml").read_text().replace("lr: 0.003", "lr: 0.001"))
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    page = Page((tmp_path / "both.html").read_text())
    top1 = [(line["step"], line["top1"]) for line in metrics(run, "eval")]
    lines = page.data["curve-eval-top1"]["lines"]
    assert [(line["name"], line["run"], line["number"]) for line in lines] == [("tiny", 0, 0), ("other", 1, 1)]
    np.testing.assert_allclose(page.points("curve-eval-top1"), top1, rtol=1e-6)
    np.testing.assert_allclose(
        page.points("curve-eval-top1", 1), [(step, 0.5 * value) for step, value in top1], rtol=1e-6
    )
    assert "optim.lr\n0.003\n0.001\n" in page.text and "model.depth" not in page.text
    best = max(value for _, value in top1)
    for result in (f"tiny\n{best:.2f}\n", f"other\n{best / 2:.2f}\n"):
        assert result in page.text
    # For a single run the verb writes its page again; a folder that isn't a run's is an error of one line.
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0 and (run / "report.html").read_text() == before
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    for wrong in ([tmp_path / "none"], [run, tmp_path], [tmp_path / "empty"], [run, "--out", tmp_path]):
        assert main(["report", *map(str, wrong)]) == 2
        output = capsys.readouterr()
        assert output.err.startswith("vit_static: ") and output.err.count("\n") == 1 and not output.out


def test_the_verb_needs_no_paddle(finished: Finished, tmp_path: Path) -> None:
    code = (
        "import sys; from vit_static.__main__ import main; code = main(sys.argv[1:]); "
        "print([name for name in ('paddle', 'nvidia', 'PIL') if name in sys.modules]); sys.exit(code)"
    )
    arguments = ["report", str(finished.config.run_dir), "--out", str(tmp_path / "page.html")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_a_report_that_cannot_be_written_does_not_stop_the_run(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is a folder in its place."""
    (config.run_dir / "report.html").mkdir(parents=True)
    (config.run_dir / "report.html" / "file").touch()
    assert train(config) and "finished" in event_names(config.run_dir)
    assert capsys.readouterr().out.count("report.html can't be written (") == 1  # not at each evaluation
    assert (config.run_dir / EVALUATION_FILE).is_file()


def test_a_stale_or_broken_error_analysis_is_not_shown(config: Config) -> None:
    train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 3})}))
    run = read_run(config.run_dir)
    assert run.error_analysis is not None and run.error_analysis.step == 3
    path = config.run_dir / EVALUATION_FILE
    of_other_run = run.error_analysis.model_copy(update={"step": 2})
    of_other_run.write(path)
    assert read_run(config.run_dir).error_analysis is None
    for broken in (b"{", b"[]", b'{"step": 3}', path.read_bytes().replace(b'"thumbnail":"', b'"thumbnail":"<')):
        path.write_bytes(broken)
        assert read_run(config.run_dir).error_analysis is None
        write_report(config.run_dir)


def test_errors_of_as_many_classes_as_imagenet_21k() -> None:
    """The analysis matches a direct count, has no confusion matrix, and is fast."""
    rng = np.random.default_rng(0)
    num_classes, num_images = 21_841, 200_000
    labels = rng.integers(0, num_classes, num_images)
    classes = np.where(rng.random(num_images) < 0.5, labels, rng.integers(0, num_classes, num_images))
    classes[labels == 7] = 21_840
    losses = rng.random(num_images) * 10
    all_predictions = Predictions(losses, (labels != classes).astype(float), classes, np.full(num_images, 0.5), labels)
    worst = worst_images(all_predictions)
    started = time.perf_counter()
    analysis = analyze_errors(all_predictions, [], num_classes, [Sample(str(n), None, None) for n in worst], 1, False)
    assert time.perf_counter() - started < 5
    assert analysis.matrix is None and len(analysis.model_dump_json(exclude={"per_class"})) < 10_000
    assert len(analysis.per_class) == num_classes and len(analysis.model_dump_json()) < 150 * num_classes
    pairs = Counter(zip(labels.tolist(), classes.tolist(), strict=True))
    wrong = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    assert (analysis.confusions[0].label, analysis.confusions[0].predicted) == (7, 21_840)
    assert [one.num_images for one in analysis.confusions] == [count for _, count in wrong.most_common(20)]
    assert all(wrong[one.label, one.predicted] == one.num_images for one in analysis.confusions)
    totals = Counter(labels.tolist())
    accuracy = sorted(pairs[label, label] / count for label, count in totals.items())
    assert [one.num_correct / one.num_images for one in analysis.classes] == accuracy[:20]
    assert all(totals[one.label] == one.num_images for one in analysis.classes)
    wrong_losses = np.sort(losses[labels != classes])[::-1]
    assert [image.loss for image in analysis.images] == wrong_losses[:MAX_IMAGES].tolist()


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U22)", "570.86.15"),
    ],
)
def test_the_driver_version_is_parsed(tmp_path: Path, line: str, version: str) -> None:
    (tmp_path / "version").write_text(f"NVRM version: NVIDIA {line}\nGCC version:  gcc version 12.3.0\n")
    assert gpu_driver(tmp_path / "version") == version
    assert gpu_driver(tmp_path / "none") is None

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
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vit_static.__main__ import main
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.export.exporter import export_checkpoint
from vit_static.report import charts
from vit_static.report.error_analysis import (
    EVALUATION_FILE,
    MAX_IMAGES,
    ErrorAnalysis,
    Sample,
    analyze_errors,
    worst_images,
)
from vit_static.report.page import CURVES, write_comparison, write_report
from vit_static.report.predictions import Predictions
from vit_static.report.run_log import read_run
from vit_static.train.run_info import gpu_driver
from vit_static.train.trainer import train


class Page(HTMLParser):
    """A page as a program reads it: chart data, lines, images and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        # Of the charts, by the id of their data:
        self.data: dict[str, Any] = {}
        self.lines: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {}  # CSS classes, pixels
        self.dots: dict[str, list[tuple[float, float]]] = {}
        self.labels: dict[str, list[str]] = {}
        self.tooltips: dict[str, list[str]] = {}
        # Of the page:
        self.sources: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[str] = []
        self.text = ""
        self._open_tags: list[str] = []
        self._chart: list[Any] = []
        self._id = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags[tag] += 1
        self.attributes += values
        self._open_tags.append(tag)
        if tag == "svg":
            self._chart = [[], [], [values.get("aria-label", "")], []]
        elif tag == "polyline":
            points = [tuple(map(float, point.split(","))) for point in values["points"].split()]
            self._chart[0].append((values["class"], points))
        elif tag == "circle":
            self._chart[1].append((float(values["cx"]), float(values["cy"])))
        elif tag == "script":
            assert values["type"] == "application/json"
            self._id = values["id"]
        elif tag == "img":
            self.sources.append(values["src"])

    def handle_endtag(self, tag: str) -> None:
        while self._open_tags and self._open_tags.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag = self._open_tags[-1] if self._open_tags else ""
        if tag == "script":
            self.data[self._id] = json.loads(data)
            self.lines[self._id], self.dots[self._id], self.labels[self._id], self.tooltips[self._id] = self._chart
        elif tag == "title" and "svg" in self._open_tags:
            self._chart[3].append(data)
        elif tag != "style":
            self.text += data + "\n"


def value_at(axis: dict[str, Any], pixels: float) -> float:
    """Return the value that a pixel coordinate represents."""
    share = (pixels - axis["start"]) / (axis["end"] - axis["start"])
    if axis["log"]:
        return axis["low"] * (axis["high"] / axis["low"]) ** share
    return axis["low"] + share * (axis["high"] - axis["low"])


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
def test_a_chart_shows_the_logged_values(finished: Finished, title: str, kind: str, key: str) -> None:
    """Its data is exact, its line within a tenth of a pixel."""
    logged = [(line["step"], line[key]) for line in metrics(finished.config.run_dir, kind) if line.get(key) is not None]
    name = f"curve-{kind}-{key}"
    if not logged:  # the peak rate of a CPU is unknown, and there is one label per image
        assert key in ("mfu", "map") and name not in finished.page.data
        return
    data = finished.page.data[name]
    assert data["title"] == title
    np.testing.assert_allclose(data["series"][0]["points"], logged, rtol=1e-6)
    for (step, value), (x, y) in zip(logged, finished.page.lines[name][0][1], strict=True):
        for expected, axis, pixel in ((step, data["x"], x), (value, data["y"], y)):
            low, high = sorted(value_at(axis, pixel + offset) for offset in (-0.06, 0.06))
            assert low <= expected <= high
    for step, value in logged:
        tooltip = f"step {step:,}: {charts.format_number(value)}"
        assert any(tooltip in text for text in finished.page.tooltips[name])
    if kind == "eval":
        assert finished.page.dots[name] == finished.page.lines[name][0][1]
    assert title in finished.page.labels[name][0]


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
    assert 0 < wrong.total() < 25  # it has learned something
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
    assert page.sources == [f"data:image/jpeg;base64,{image.thumbnail}" for image in analysis.images]
    for image in analysis.images:
        assert image.path in page.text
    (started,) = [line for line in metrics(run, "event") if line["event"] == "started"]
    assert started["mesh"]["world_size"] == 1 and started["mesh"]["precision"] == "O0 float32"
    for fact in (started["environment"]["cpu"], started["environment"]["paddle"], started["time"], "O0 float32"):
        assert f"{fact}\n" in page.text
    assert "model.mlp_dim\n64\nnull\n" in page.text and "optim.lr\n0.003\n0.001\n" in page.text
    assert "finished" in page.text and "optim.weight_decay\n" not in page.text
    text = (run / "report.html").read_text()
    assert not {"link", "iframe", "object"} & set(page.tags) and "@import" not in text and "url(" not in text
    assert not {"href", "xlink:href", "srcset"} & set(page.attributes)
    assert page.tags["script"] == len(page.data)


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
    page = Page(write_report(tmp_path).read_text())
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    points = page.data["curve-train-loss"]["series"][0]["points"]
    value_of_step = dict(points)
    assert len(points) < 900 and page.lines["curve-train-loss"][1][0].endswith("smoothed")
    for column in np.split(np.arange(len(steps)), np.flatnonzero(np.diff((steps * 408 / 300_000).astype(int))) + 1):
        for extreme in (values[column].min(), values[column].max()):
            assert value_of_step[int(steps[np.flatnonzero(values == extreme)[0]])] == pytest.approx(extreme, rel=1e-6)
    mean = dict(page.data["curve-train-loss"]["series"][0]["smoothed"])
    index = next(index for index in range(1000, 29_000) if int(steps[index]) in mean)
    half = len(steps) // 80
    assert mean[int(steps[index])] == pytest.approx(values[index - half : index + half + 1].mean(), rel=1e-6)


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
    data = page.data["curve-train-loss"]
    assert data["series"][0]["points"] == [[1, 8.0], [2, 7.0], [4, 5.0], [7, 3.0]]
    assert data["marks"] == [[2, "resumed"], [4, "rolled back"]]
    assert {"resumed at step 2", "rolled back at step 4"} <= set(page.tooltips["curve-train-loss"])
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
    for text in texts:
        page = Page(text)
        assert not {"b", "i", "u", "s"} & set(page.tags) - {"b"} and "onerror" not in page.attributes
        assert page.tags["script"] == len(page.data) > 0 and page.sources == []
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
    series = page.data["curve-eval-top1"]["series"]
    assert [one["name"] for one in series] == ["tiny", "other"]
    np.testing.assert_allclose(series[0]["points"], top1, rtol=1e-6)
    np.testing.assert_allclose(series[1]["points"], [(step, 0.5 * value) for step, value in top1], rtol=1e-6)
    assert len({classes for classes, _ in page.lines["curve-eval-top1"]}) == 2  # two colours
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
    (tmp_path / "empty" / "metrics.jsonl").write_text('[1]\n{"kind": "train"}\n{"kind": "tr')
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


chart_values = st.floats(-1e9, 1e9, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-12)


@given(st.tuples(chart_values, chart_values).map(sorted))
def test_an_axis_covers_the_values_and_has_round_ticks(bounds: list[float]) -> None:
    low, high = bounds
    if high - low < 1e-6 * abs(high):
        high = low
    axis = charts.value_axis([low, high], may_be_log=False)
    tolerance = 1e-8 * (axis.high - axis.low)  # less than a thousandth of a pixel
    assert axis.low <= low + tolerance and high - tolerance <= axis.high
    assert 2 <= len(axis.ticks) <= 8
    step = axis.ticks[1] - axis.ticks[0]
    mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - factor) for factor in (1, 2, 5)) < 1e-3
    pixels = [axis.to_pixels(tick) for tick in axis.ticks]
    assert pixels == sorted(pixels, reverse=True)
    assert (round(pixels[0]), round(pixels[-1])) == (charts.BOTTOM, charts.TOP)
    read_back = [float(label.replace(",", "")) for label in charts.tick_labels(axis)]
    np.testing.assert_allclose(read_back, axis.ticks, atol=0.01 * step)


@given(st.floats(1e-12, 1e9), st.floats(101, 1e9))
def test_a_logarithmic_axis_has_round_ticks(low: float, ratio: float) -> None:
    high = low * ratio
    axis = charts.value_axis([low, low, low, high], may_be_log=True)
    assert axis.is_log and axis.low <= low * (1 + 1e-9) and high * (1 - 1e-9) <= axis.high
    assert 2 <= len(axis.ticks) <= 9
    read_back = [float(label.replace(",", "")) for label in charts.tick_labels(axis)]
    np.testing.assert_allclose(read_back, axis.ticks, rtol=1e-6)
    for tick in axis.ticks:
        mantissa = tick / 10.0 ** math.floor(math.log10(tick) + 1e-6)
        assert min(abs(mantissa - factor) for factor in (1, 2, 5)) < 1e-6


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

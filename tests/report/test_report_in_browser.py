"""The report's page in Chromium: values under the pointer, zoom, axes, toggles, reloads, and no requests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import Browser, chromium

from vit_static.report import page
from vit_static.report.page import write_comparison, write_live_report, write_report
from vit_static.report.run_log import read_metrics

NUM_STEPS = 60
# The texts of the tooltips that are shown; Bokeh puts them into shadow trees.
TOOLTIPS = """[...document.querySelectorAll(".bk-Tooltip")]
  .map(tooltip => [...tooltip.shadowRoot.querySelectorAll(".bk-tooltip-row-value")].map(cell => cell.innerText.trim()))
  .filter(cells => cells.length > 0)"""


def entries_of_run(num_steps: int = NUM_STEPS, seed: int = 0, has_ended: bool = True) -> list[dict[str, Any]]:
    """Return a log with ten steps per epoch and an evaluation after each."""
    rng = np.random.default_rng(seed)
    entries: list[dict[str, Any]] = [{"kind": "event", "step": 0, "event": "started", "total_steps": NUM_STEPS}]
    for step in range(1, num_steps + 1):
        position = {"step": step, "epoch": step / 10, "seconds": 3.0 * step}
        loss, norm = (float(10.0 * np.exp(-step / 20) * rng.uniform(0.9, 1.1)) for _ in range(2))
        entries.append({"kind": "train", **position, "loss": loss, "lr": 1e-5 * step, "grad_norm": norm})
        if step % 10 == 0:
            entries.append(
                {"kind": "eval", **position, "top1": float(rng.uniform(50, 90)), "loss": loss, "num_images": 9}
            )
    return entries + [{"kind": "event", "step": num_steps, "event": "finished"}] * has_ended


def write_run(folder: Path, entries: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "config.yaml").write_text("name: synthetic\nmodel: {num_classes: 5}\n")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(chromium()) as started:
        yield started


def open_page(browser: Browser, path: Path) -> None:
    """Open a page and wait until its charts are drawn."""
    browser.requests.clear()
    browser.open(path.as_uri())
    browser.wait_until("[...document.querySelectorAll('.plot')].every(plot => plot.childElementCount > 0)")
    browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def box_of(browser: Browser, chart: str) -> tuple[float, float, float, float]:
    """Scroll a chart into view, and return the left, top, width and height of its plot."""
    element = f"document.getElementById({json.dumps(chart)}).closest('figure').querySelector('.plot')"
    browser.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
    box = browser.evaluate(f"{element}.getBoundingClientRect().toJSON()")
    return box["x"], box["y"], box["width"], box["height"]


def x_range(browser: Browser) -> tuple[float, float]:
    return tuple(browser.evaluate("[drawn.range.start, drawn.range.end]"))


@pytest.mark.slow
def test_the_pointer_shows_the_values_of_the_log(browser: Browser, tmp_path: Path) -> None:
    """And a cursor at the same step in the other charts."""
    run = write_run(tmp_path / "run", entries_of_run())
    open_page(browser, write_report(run))
    logged = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"}
    for chart, key in (("curve-train-loss", "loss"), ("curve-train-lr", "lr")):
        left, top, width, height = box_of(browser, chart)
        shown_steps = set()
        for share in (0.3, 0.5, 0.7):
            browser.move(left + share * width, top + 0.4 * height)
            browser.wait_until(f"{TOOLTIPS}.length === 1")
            ((where, value, *_),) = browser.evaluate(TOOLTIPS)
            step = int(re.match(r"step (\d+), ", where)[1])
            assert where.startswith(f"step {step}, epoch {step / 10:g}, ")
            assert float(value) == pytest.approx(logged[step][key], rel=1e-5)
            cursors = browser.evaluate(
                "[...drawn.plots.values()].map(plot => plot.toolbar.tools"
                ".find(tool => tool.type === 'CrosshairTool').overlay.location)"
            )
            assert len(set(cursors)) == 1 and cursors[0] == pytest.approx(step, abs=0.6)
            shown_steps.add(step)
            browser.move(1, 1)
            browser.wait_until(f"{TOOLTIPS}.length === 0")
        assert len(shown_steps) == 3
    assert browser.page_errors == [] and browser.requests == [(run / "report.html").as_uri()]
    assert browser.evaluate("document.body.innerText").count("top-5") == 0  # there are five classes


@pytest.mark.slow
def test_a_resumed_run_has_its_charts_with_a_mark(browser: Browser, tmp_path: Path) -> None:
    entries = entries_of_run()
    resumed = {"kind": "event", "step": 24, "event": "resumed", "from_step": 24}
    rolled_back = {"kind": "event", "step": 40, "event": "rolled back", "from_step": 41}
    for event in (rolled_back, resumed):
        entries.insert(1 + event["step"] + event["step"] // 10, event)
    open_page(browser, write_report(write_run(tmp_path / "run", entries)))
    assert browser.page_errors == []
    (marked,) = browser.evaluate(
        "[...drawn.plots.values()].slice(0, 1).map(plot => plot.renderers.filter(each => each.glyph.type === 'VSpan')"
        ".map(each => [...each.data_source.data.x]))"
    )
    assert marked == [[24, 40]]
    # All charts are painted: Bokeh's figures have their width and an axis.
    assert browser.evaluate("[...document.querySelectorAll('.plot')].every(plot => plot.offsetHeight > 100)")


@pytest.mark.slow
def test_a_drag_zooms_all_charts_and_a_reload_keeps_what_was_chosen(browser: Browser, tmp_path: Path) -> None:
    entries = entries_of_run()
    open_page(browser, write_report(write_run(tmp_path / "run", entries)))
    full = x_range(browser)
    assert full[0] < 0 and full[1] > NUM_STEPS
    left, top, width, height = box_of(browser, "curve-train-loss")
    browser.drag((left + 0.4 * width, top + 0.1 * height), (left + 0.7 * width, top + 0.6 * height))
    browser.wait_until("drawn.range.end < 0.9 * drawn.full[1]")
    zoomed = x_range(browser)
    assert 0.3 < (zoomed[0] - full[0]) / (full[1] - full[0]) < 0.5 < (zoomed[1] - full[0]) / (full[1] - full[0]) < 0.8
    assert browser.evaluate("[...drawn.plots.values()].every(plot => plot.x_range === drawn.range)")
    shown = [line["lr"] for line in entries if line["kind"] == "train" and zoomed[0] <= line["step"] <= zoomed[1]]
    margin = 0.05 * (shown[-1] - shown[0])  # the vertical axis fits the steps that are shown
    rates = "drawn.plots.get('curve-train-lr').y_range"
    browser.wait_until(f"Math.abs({rates}.start - {shown[0] - margin}) < 1e-12")
    assert browser.evaluate(f"{rates}.end") == pytest.approx(shown[-1] + margin)
    browser.evaluate("window.isFirstLoad = true")
    browser.send("Page.reload")
    browser.wait_until("document.readyState === 'complete' && !window.isFirstLoad && drawn !== null")
    assert x_range(browser) == pytest.approx(zoomed)
    left, top, width, height = box_of(browser, "curve-train-loss")
    browser.double_click(left + 0.5 * width, top + 0.5 * height)
    browser.wait_until("drawn.range.start === drawn.full[0]")
    assert x_range(browser) == pytest.approx(full)

    ends = {"epoch": 6.0, "time": 3.0 * NUM_STEPS, "progress": 100.0, "step": float(NUM_STEPS)}  # less than 5 min: in s
    for axis, end in ends.items():
        browser.evaluate(
            f"document.querySelector('#x-axis').value = '{axis}'; "
            "document.querySelector('#x-axis').dispatchEvent(new Event('input'))"
        )
        low, high = x_range(browser)
        assert low < 0 and high / 1.02 < end < high
    assert browser.page_errors == []


@pytest.mark.slow
def test_a_tap_shows_values_and_a_finger_on_a_chart_scrolls_the_page(browser: Browser, tmp_path: Path) -> None:
    browser.send("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.send("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    open_page(browser, write_report(write_run(tmp_path / "run", entries_of_run())))
    left, top, width, height = box_of(browser, "curve-train-loss")
    browser.touch(left + 0.5 * width, top + 0.5 * height)
    browser.wait_until(f"{TOOLTIPS}.length === 1")
    assert browser.evaluate(TOOLTIPS)[0][0].startswith("step ")
    browser.evaluate("scrollTo(0, 0)")
    left, top, width, height = box_of(browser, "curve-train-lr")
    scrolled = browser.evaluate("scrollY")
    browser.touch(left + 0.5 * width, *(top + 0.9 * height - 20.0 * number for number in range(10)))
    browser.wait_until(f"scrollY > {scrolled} + 50")
    browser.send("Emulation.setTouchEmulationEnabled", enabled=False)
    browser.send("Emulation.clearDeviceMetricsOverride")
    assert browser.page_errors == []


@pytest.mark.slow
def test_runs_are_toggled_smoothed_and_shown_on_a_dark_page(browser: Browser, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, entries_of_run(seed=seed)) for seed, name in enumerate(("a", "b", "c"))]
    open_page(browser, write_comparison(runs, tmp_path / "runs.html"))
    visible = "drawn.lines.filter(each => each.raw.visible).map(each => each.line.name)"
    assert set(browser.evaluate(visible)) == {"a", "b", "c"}
    browser.evaluate("document.querySelector('[data-toggle=\"1\"]').click()")
    assert set(browser.evaluate(visible)) == {"a", "c"}

    # With weight w the smoothed values are the normalized sums of w^(n - i) v_i.
    browser.evaluate(
        "document.querySelector('#smoothing').value = 0.9; "
        "document.querySelector('#smoothing').dispatchEvent(new Event('input'))"
    )
    line = "drawn.lines.find(each => each.line.name === 'c' && each.smooth).source.data"
    raw, smooth = (np.array(browser.evaluate(f"[...{line}.{column}]")) for column in ("y", "smooth"))
    for end in (1, 2, NUM_STEPS):
        weights = 0.9 ** np.arange(end)[::-1]
        assert smooth[end - 1] == pytest.approx((weights * raw[:end]).sum() / weights.sum(), rel=1e-9)

    background = "getComputedStyle(document.body).backgroundColor"
    colours = "[...drawn.plots.values()].map(plot => plot.below[0].major_label_text_color)"
    before = browser.evaluate(f"[{background}, ...{colours}]")
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.wait_until(f"JSON.stringify({colours}) !== {json.dumps(json.dumps(before[1:], separators=(',', ':')))}")
    assert browser.evaluate(background) != before[0]
    assert set(browser.evaluate(visible)) == {"a", "c"}  # drawn again, with what was chosen
    browser.send("Emulation.setEmulatedMedia", features=[])
    assert browser.page_errors == [] and browser.requests == [(tmp_path / "runs.html").as_uri()]


@pytest.mark.slow
def test_a_page_reloads_itself_until_the_run_ends(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there before the first step, and shows training before the first evaluation."""
    monkeypatch.setattr(page, "REFRESH_S", 1.0)
    run = write_run(tmp_path / "run", entries_of_run(0, has_ended=False))
    assert write_live_report(run)
    browser.open((run / "report.html").as_uri())
    browser.wait_until("document.body?.innerText.includes('No step has been logged yet')")
    browser.wait_until("document.readyState === 'complete' && document.querySelector('#refresh').checked")
    write_run(run, entries_of_run(4, has_ended=False))
    assert write_live_report(run)
    browser.wait_until("document.body?.innerText.includes('4 of 60')")
    browser.wait_until("document.readyState === 'complete' && document.querySelectorAll('.plot').length === 3")
    write_run(run, entries_of_run())
    assert not write_live_report(run)
    browser.wait_until("document.readyState === 'complete' && document.body.innerText.includes('60 of 60')")
    assert browser.evaluate("page.refresh_s") is None and browser.page_errors == []


@pytest.mark.slow
def test_the_page_of_a_killed_run_does_not_reload_itself_forever(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log has no end, but the page is old."""
    run = write_run(tmp_path / "run", entries_of_run(4, has_ended=False))
    now = page.time.time()
    monkeypatch.setattr(page.time, "time", lambda: now - 4000.0)
    assert write_live_report(run)
    open_page(browser, run / "report.html")
    browser.wait_until("document.querySelector('#live').textContent.includes('may have been killed')")
    assert browser.page_errors == []

// Draws the report's charts with BokehJS (https://docs.bokeh.org), and reloads the page of a run that goes on.
"use strict";

const MAX_RUN_SILENCE_S = 3600;  // a page that hasn't been written for longer is of a run that was killed
const COLOURS = 6;
const $ = (selector, parent = document) => parent.querySelector(selector);
const readJson = element => JSON.parse(element.textContent);
const page = readJson($("#page"));
const charts = [...document.querySelectorAll("figure.chart")].map(element => ({
  element, id: $("script", element).id, target: $(".plot", element), data: readJson($("script", element)),
}));
const curves = charts.filter(chart => chart.data.lines);

// -- what the reader has chosen; it outlives a reload ---------------------------------------------------------------

const STORAGE_KEY = `vit_static report ${location.pathname}`;
const numPoints = Math.max(0, ...curves.filter(chart => chart.data.smooth)
  .flatMap(chart => chart.data.lines.map(line => line.steps.length)));
const state = {x: "step", scale: "auto", smoothing: numPoints < 40 ? 0 : 0.6, hidden: [], refresh: true, zoom: null};
try {
  Object.assign(state, JSON.parse(sessionStorage.getItem(STORAGE_KEY) ?? "{}"));
} catch { /* a browser that stores nothing for files: each load starts with the defaults */ }

function save() {
  try {
    sessionStorage.setItem(STORAGE_KEY, JSON.stringify(state));
  } catch { /* see above */ }
}

// -- values ----------------------------------------------------------------------------------------------------------

function formatNumber(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(4).replace(/\.?0+e/, "e").replace("e+", "e");
  const digits = Math.min(Math.max(5 - Math.floor(Math.log10(size || 1)), 0), 8);
  return value.toLocaleString("en-US", {maximumFractionDigits: digits});
}

function duration(seconds) {
  if (seconds < 60) return `${formatNumber(Math.round(10 * seconds) / 10)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Interpolate a column of a run's timeline at a step. */
function interpolate(timeline, column, step) {
  const steps = timeline.steps, values = timeline[column];
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  if (steps[low] <= step || low === 0) return values[low];
  const share = (step - steps[low - 1]) / (steps[low] - steps[low - 1]);
  return values[low - 1] + share * (values[low] - values[low - 1]);
}

const seconds = page.runs.map(run => run.timeline.seconds?.at(-1) ?? 0);
const [timeUnit, unitSeconds] = Math.max(...seconds) < 300 ? ["s", 1] : Math.max(...seconds) < 10800 ? ["min", 60] : ["h", 3600];
const AXES = {
  step: {label: "step", has: () => true, of: (run, step) => step},
  epoch: {label: "epoch", has: run => run.timeline.epochs, of: (run, step) => interpolate(run.timeline, "epochs", step)},
  time: {
    label: `wall time (${timeUnit})`,
    has: run => run.timeline.seconds,
    of: (run, step) => interpolate(run.timeline, "seconds", step) / unitSeconds,
  },
  progress: {label: "share of all steps (%)", has: run => run.total_steps, of: (run, step) => 100 * step / run.total_steps},
};

/** Describe a step for a tooltip. */
function describe(run, step) {
  const parts = [`step ${step.toLocaleString("en-US")}`];
  if (run.timeline.epochs) parts.push(`epoch ${formatNumber(Math.round(100 * AXES.epoch.of(run, step)) / 100)}`);
  if (run.timeline.seconds) parts.push(duration(interpolate(run.timeline, "seconds", step)));
  return parts.join(", ");
}

/** Return the exponential moving average without the bias towards 0 at the start (Adam's correction, arXiv 1412.6980). */
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map(value => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

/** Return whether a linear axis would squeeze most of the values to one end. */
function needsLogScale(values) {
  const sorted = Float64Array.from(values).sort(), [low, high] = [sorted[0], sorted.at(-1)];
  return low > 1e-290 && high / low >= 100 && sorted[sorted.length >> 1] - low < 0.05 * (high - low);
}

// -- drawing ---------------------------------------------------------------------------------------------------------

let drawn = null;  // what has been drawn: the shared range, the plots, the lines, the tooltips of charts that can be smoothed

function draw() {
  const style = getComputedStyle(document.documentElement);
  const theme = Object.fromEntries(["ink", "soft", "line", "page"].map(name => [name, style.getPropertyValue(`--${name}`).trim()]));
  theme.colours = Array.from({length: COLOURS}, (_, number) => style.getPropertyValue(`--c${number}`).trim());
  const axis = AXES[state.x];
  const ends = curves.flatMap(chart => chart.data.lines).filter(line => axis.has(page.runs[line.run]))
    .flatMap(line => [line.steps[0], line.steps.at(-1)].map(step => axis.of(page.runs[line.run], step)));
  const [low, high] = [Math.min(...ends, 0), Math.max(...ends, state.x === "step" ? 1 : 0)];
  const [start, end] = [low - 0.01 * (high - low || 1), high + 0.01 * (high - low || 1)];
  const range = new Bokeh.Range1d({start: state.zoom?.[0] ?? start, end: state.zoom?.[1] ?? end});
  const cursor = new Bokeh.Span({dimension: "height", line_color: theme.soft, line_dash: [3, 3]});
  drawn = {range, full: [start, end], plots: new Map(), lines: [], hovers: []};
  const bokehDocument = new Bokeh.Document();
  for (const chart of charts) {
    const plot = chart.data.lines ? drawCurve(chart, theme, axis, range, cursor) : drawReliability(chart, theme);
    drawn.plots.set(chart.id, plot);
    bokehDocument.add_root(plot);
  }
  for (const chart of charts) chart.target.replaceChildren();
  showLines();
  let isFitting = false;
  range.change.connect(() => {
    if (isFitting) return;
    isFitting = true;  // both ends change, in several steps
    requestAnimationFrame(() => { isFitting = false; fitHeights(); });
  });
  return Bokeh.embed.add_document_standalone(bokehDocument, document.body, charts.map(chart => chart.target));
}

/** Return an empty plot in the colours of the page. */
function emptyPlot(theme, options, xLabel) {
  const isTouch = matchMedia("(pointer: coarse)").matches;
  const plot = Bokeh.Plotting.figure({
    height: 230, sizing_mode: "stretch_width", tools: [], min_border_right: 12, background_fill_color: null,
    border_fill_color: null, outline_line_color: theme.line, ...options,
  });
  plot.toolbar.logo = null;
  plot.toolbar.autohide = true;
  if (isTouch) plot.toolbar_location = null;  // a finger scrolls the page
  for (const each of [...plot.below, ...plot.left]) {
    each.axis_line_color = each.major_tick_line_color = theme.line;
    each.minor_tick_line_color = null;
    each.major_label_text_color = each.axis_label_text_color = theme.soft;
    each.axis_label_text_font_style = "normal";
    each.axis_label_text_font_size = each.major_label_text_font_size = "11px";
  }
  for (const grid of [...plot.xgrid, ...plot.ygrid]) grid.grid_line_color = theme.line;
  for (const each of plot.below) each.axis_label = xLabel;
  for (const {formatter} of plot.left) {
    if (formatter instanceof Bokeh.BasicTickFormatter) formatter.power_limit_low = -6;  // 0.00001, not 1.000e-5
  }
  return plot;
}

function drawCurve(chart, theme, axis, range, cursor) {
  const {data} = chart;
  const lines = data.lines.filter(line => axis.has(page.runs[line.run]));
  const values = lines.flatMap(line => line.values);
  const isLog = data.log && (state.scale === "log" ? values.some(value => value > 0)
    : state.scale === "auto" && values.length > 0 && needsLogScale(values));
  const plot = emptyPlot(theme, {x_range: range, y_range: new Bokeh.Range1d(), y_axis_type: isLog ? "log" : "linear"}, axis.label);
  const renderers = lines.map(line => drawLine(plot, chart, line, theme, axis, isLog));
  const tooltips = [["", "@where"], [data.title, "@text"]];
  if (data.lines.length > 1) tooltips.unshift(["", "@name"]);
  const hover = new Bokeh.HoverTool({mode: "vline", renderers, tooltips});
  if (data.smooth) drawn.hovers.push({hover, raw: tooltips, smooth: [...tooltips, ["smoothed", "@smooth_text"]]});
  plot.add_tools(
    new Bokeh.BoxZoomTool({dimensions: "width"}), new Bokeh.WheelZoomTool({dimensions: "width"}), new Bokeh.PanTool({dimensions: "width"}),
    new Bokeh.CrosshairTool({overlay: cursor}), hover,
  );
  plot.toolbar.active_drag = matchMedia("(pointer: coarse)").matches ? null : plot.toolbar.tools[0];
  plot.toolbar.active_scroll = null;  // the wheel scrolls the page until the reader chooses the tool
  drawMarks(plot, data.marks, theme, axis);
  if (!data.toggles) {
    plot.legend.label_text_color = theme.ink;
    plot.legend.background_fill_color = theme.page;
    plot.legend.click_policy = "hide";
  }
  return plot;
}

/** Add a line, its smoothed one and its dots to a plot. Return what the pointer finds. */
function drawLine(plot, chart, line, theme, axis, isLog) {
  const run = page.runs[line.run], {data} = chart;
  const source = new Bokeh.ColumnDataSource({data: {
    x: line.steps.map(step => axis.of(run, step)),
    y: isLog ? line.values.map(value => value > 0 ? value : NaN) : line.values,  // the rate before a warm-up is 0
    smooth: line.values,
    where: line.steps.map(step => describe(run, step)),
    text: line.values.map(formatNumber),
    smooth_text: line.values.map(formatNumber),
    name: line.steps.map(() => line.name),
  }});
  const look = {source, line_color: theme.colours[line.number % COLOURS], line_dash: line.dashed ? [5, 3] : "solid"};
  const legend = data.toggles ? {} : {legend_label: line.name};
  const raw = plot.line({field: "x"}, {field: "y"}, {...look, ...legend, line_width: 1.6});
  const dots = data.dots && line.steps.length <= 150 || line.steps.length === 1
    ? plot.scatter({field: "x"}, {field: "y"}, {source, size: 5, line_color: null, fill_color: look.line_color, ...legend}) : null;
  const smooth = data.smooth ? plot.line({field: "x"}, {field: "smooth"}, {...look, line_width: 1.8}) : null;
  raw.hover_glyph = null;
  drawn.lines.push({line, plot, isLog, source, raw, smooth, dots, hasToggle: data.toggles});
  return raw;
}

function drawMarks(plot, marks, theme, axis) {
  const run = page.runs[0];
  if (!marks.length || !axis.has(run)) return;
  const source = new Bokeh.ColumnDataSource({data: {
    x: marks.map(([step]) => axis.of(run, step)),
    label: marks.map(([step, label]) => `${label} at step ${step.toLocaleString("en-US")}`),
    colour: marks.map(([, , isRollback]) => isRollback ? theme.colours[1] : theme.soft),
  }});
  const dash = {value: [2, 3]};  // a list alone would be one dash per mark
  const renderer = plot.vspan({field: "x"}, {source, line_color: {field: "colour"}, line_dash: dash});
  plot.add_tools(new Bokeh.HoverTool({renderers: [renderer], tooltips: [["", "@label"]]}));
}

function drawReliability(chart, theme) {
  const {bins, x_label: xLabel} = chart.data, width = 1 / bins.length;
  const shown = bins.map((bin, number) => ({...bin, middle: (number + 0.5) * width})).filter(bin => bin.num_predictions);
  const source = new Bokeh.ColumnDataSource({data: {
    x: shown.map(bin => bin.middle),
    accuracy: shown.map(bin => bin.accuracy),
    confidence: shown.map(bin => bin.confidence),
    count: shown.map(bin => bin.num_predictions.toLocaleString("en-US")),
  }});
  const plot = emptyPlot(theme, {
    x_range: new Bokeh.Range1d({start: 0, end: 1}), y_range: new Bokeh.Range1d({start: 0, end: 1}), height: 260,
  }, xLabel);
  const bars = plot.vbar({field: "x"}, 0.92 * width, {field: "accuracy"}, 0, {
    source, fill_color: theme.colours[0], fill_alpha: 0.6, line_color: null,
  });
  plot.line([0, 1], [0, 1], {line_color: theme.soft, line_dash: [5, 3]});
  const tooltips = [["confidence", "@confidence{0.000}"], ["accuracy", "@accuracy{0.000}"], ["predictions", "@count"]];
  plot.add_tools(new Bokeh.HoverTool({renderers: [bars], tooltips}));
  return plot;
}

/** Apply the toggles and the smoothing to the lines that are drawn. */
function showLines() {
  for (const {line, source, raw, smooth, dots, hasToggle} of drawn.lines) {
    const isVisible = !hasToggle || !state.hidden.includes(line.number);
    const isSmoothed = smooth !== null && state.smoothing > 0;
    if (smooth !== null) {
      const values = isSmoothed ? smoothed(line.means ?? line.values, state.smoothing) : line.values;
      source.data = {...source.data, smooth: values, smooth_text: values.map(formatNumber)};
      smooth.visible = isVisible && isSmoothed;
    }
    raw.visible = isVisible;
    raw.glyph.line_alpha = isSmoothed ? 0.35 : 1;
    if (dots !== null) dots.visible = isVisible;
  }
  for (const {hover, raw, smooth} of drawn.hovers) hover.tooltips = state.smoothing > 0 ? smooth : raw;
  fitHeights();
}

/** Fit each vertical axis to what is visible of the lines between the ends of the horizontal one. */
function fitHeights() {
  const {start, end} = drawn.range;
  for (const {id} of curves) {
    const plot = drawn.plots.get(id);
    const lines = drawn.lines.filter(each => each.plot === plot && each.raw.visible);
    const isLog = lines.some(each => each.isLog);
    let low = Infinity, high = -Infinity;
    for (const {source: {data}} of lines) {
      data.x.forEach((x, index) => {
        const value = data.y[index];
        if (x < start || x > end || Number.isNaN(value)) return;
        low = Math.min(low, value);
        high = Math.max(high, value);
      });
    }
    if (low > high) continue;  // nothing is visible
    const margin = isLog ? (high / low) ** 0.05 * 1.05 : 0.05 * (high - low) || 0.1 * Math.abs(high) || 1;
    plot.y_range.setv(isLog ? {start: low / margin, end: high * margin} : {start: low - margin, end: high + margin});
  }
}

/** Remember where the reader has zoomed to, for the next time that the charts are drawn. */
function keepZoom() {
  const {range: {start, end}, full} = drawn;
  const isZoomed = Math.abs(start - full[0]) + Math.abs(end - full[1]) > 1e-6 * (full[1] - full[0]);
  state.zoom = isZoomed ? [start, end] : null;
}

// -- controls --------------------------------------------------------------------------------------------------------

function connectControls() {
  const choose = (id, key, read, apply) => {
    const input = $(id);
    input.value = state[key];
    input.addEventListener("input", () => { state[key] = read(input); save(); apply(); });
  };
  for (const option of $("#x-axis").options) option.disabled = !page.runs.some(AXES[option.value].has);
  choose("#x-axis", "x", input => input.value, () => { state.zoom = null; draw(); });
  choose("#scale", "scale", input => input.value, () => { state.zoom = null; draw(); });
  choose("#smoothing", "smoothing", input => Number(input.value), () => { showSmoothing(); showLines(); });
  for (const input of document.querySelectorAll("[data-toggle]")) {
    const number = Number(input.dataset.toggle);
    input.checked = !state.hidden.includes(number);
    input.addEventListener("input", () => {
      state.hidden = state.hidden.filter(each => each !== number).concat(input.checked ? [] : [number]);
      save();
      showLines();
    });
  }
  const reset = () => { state.zoom = null; save(); draw(); };
  $("#reset").addEventListener("click", reset);
  for (const {target} of charts) {
    target.addEventListener("dblclick", reset);
    target.addEventListener("click", showTapped);
  }
  showSmoothing();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { keepZoom(); draw(); });
  addEventListener("pagehide", () => { keepZoom(); save(); });
}

/** Show the values where a finger has tapped: Bokeh shows those under a pointer that moves. */
function showTapped(event) {
  if (event.pointerType !== "touch") return;
  const {clientX, clientY} = event;
  event.composedPath()[0].dispatchEvent(new PointerEvent("pointermove", {
    clientX, clientY, pointerId: 1, pointerType: "mouse", isPrimary: true, bubbles: true, composed: true,
  }));
}

function showSmoothing() {
  $("#smoothing-value").textContent = state.smoothing.toFixed(2);
}

/** Reload the page while the run goes on, but not while the reader points at something. */
function refreshWhileRunning() {
  if (page.refresh_s === null) return;
  $("#refresh").checked = state.refresh;
  $("#refresh").addEventListener("input", event => { state.refresh = event.target.checked; save(); });
  const loaded = Date.now();
  let lastMove = 0;
  addEventListener("pointermove", () => { lastMove = Date.now(); });
  addEventListener("pointerdown", () => { lastMove = Date.now(); });
  $("#written").textContent = new Date(page.written * 1000).toLocaleTimeString();
  const timer = setInterval(() => {
    const now = Date.now();
    if (now / 1000 - page.written > MAX_RUN_SILENCE_S) {
      $("#live").textContent = "This page hasn't been written for an hour: the run may have been killed.";
      clearInterval(timer);
    } else if (state.refresh && !document.hidden && now - loaded > 1000 * page.refresh_s && now - lastMove > 3000) {
      clearInterval(timer);
      location.reload();
    }
  }, 500);
}

if (charts.length) {
  connectControls();
  draw();
}
refreshWhileRunning();

"""The files of a run as the report reads them: metrics.jsonl without undone steps, config, error analysis."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vit_static.common.errors import UserError, newer_format
from vit_static.config.data_schema import SelectionMetric
from vit_static.config.schema import Config
from vit_static.config.yaml_loader import YamlError, read_yaml
from vit_static.report.error_analysis import EVALUATION_FILE, ErrorAnalysis
from vit_static.report.metric_names import METRIC_TITLES

METRICS_FILE = "metrics.jsonl"
METRICS_FORMAT = 1  # in the events `started` and `resumed`; without a number it is 1
EXTRA_EVAL = "eval_also"  # the kind of entries of further validation sets; `set` is the name of theirs
RECORDS_LOST, SINK_FAILED = "records lost", "sink failed"  # events about the log itself, not about the run
IMAGE_SIZE = "image size"  # the event before the first step on images of this size (train.image_sizes)
EARLY_STOP = "early stop"  # the event before `finished`, if train.patience ended the run
# What the last event of a run says about its state.
END_STATES = {
    "finished": "finished",
    "stopped": "stopped on request",
    "bad image": "stopped: an image can't be read",
    "not saved": "stopped: no checkpoint could be written",
    "not finite": "stopped: gradients are not finite",
}
SPEED_KEYS = frozenset({"images_per_s", "data_wait", "mfu"})  # of training
_SESSION_EVENTS = ("started", "resumed")
_REWIND_EVENTS = ("resumed", "rolled back")  # later steps of the log were undone
# What is beyond these is no measurement of a run, but damage. Sums of numbers up to the largest are finite.
_MAX_LINE_BYTES, _MAX_STEP, _MAX_NUMBER, _MAX_DEPTH = 1 << 20, 10**15, 1e100, 8


@dataclass(frozen=True)
class Session:
    """A start or resumption of a run."""

    step: int
    event: str
    time: str
    setup: dict[str, dict[str, Any]]  # by part: mesh, environment


@dataclass(frozen=True)
class RunLogData:
    """The log, the config and the error analysis of a run."""

    name: str
    all_entries: list[dict[str, Any]]  # of the log, since the last start from step 0
    config: dict[str, Any] | None  # by section.key; missing keys have their defaults; None if it can't be read
    config_text: str
    error_analysis: ErrorAnalysis | None  # of its last evaluation
    num_unread_lines: int = 0  # of the log

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """The entries of the log without the steps that were undone by going back to a checkpoint."""
        valid: list[dict[str, Any]] = []
        for entry in self.all_entries:
            if entry.get("event") in _REWIND_EVENTS:
                valid = [earlier for earlier in valid if earlier["kind"] == "event" or earlier["step"] <= entry["step"]]
            valid.append(entry)
        return valid

    def points(self, kind: str, key: str) -> list[tuple[int, float]]:
        """Return the finite values of `key` as (step, value), sorted; the last one if a step is logged twice.

        The speed of the first step is left out, because that step compiles the program.
        """
        values: dict[int, Any] = {entry["step"]: entry.get(key) for entry in self._entries_of_kind(kind)}
        if key in SPEED_KEYS:
            values.pop(1, None)
        return sorted((step, float(value)) for step, value in values.items() if _is_number(value))

    def _entries_of_kind(self, kind: str) -> list[dict[str, Any]]:
        return self._entries_by_kind.get(kind, [])

    @cached_property
    def _entries_by_kind(self) -> dict[str, list[dict[str, Any]]]:
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for entry in self.entries:
            by_kind.setdefault(entry["kind"], []).append(entry)
        return by_kind

    def values(self, key: str) -> list[float]:
        """Return all finite values of `key` in the order of the log, including undone steps."""
        return [float(entry[key]) for entry in self.all_entries if _is_number(entry.get(key))]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations, one per step."""
        return list({entry["step"]: entry for entry in self._entries_of_kind("eval")}.values())

    @cached_property
    def extra_evaluations(self) -> dict[str, list[dict[str, Any]]]:
        """The evaluations on further validation sets (eval.also) by the set's name, one per step, in their order."""
        by_name: dict[str, dict[int, dict[str, Any]]] = {}
        for entry in self._entries_of_kind(EXTRA_EVAL):
            if isinstance(entry.get("set"), str) and _is_number(entry.get("top1")):
                by_name.setdefault(entry["set"], {})[entry["step"]] = entry
        return {name: [entries[step] for step in sorted(entries)] for name, entries in by_name.items()}

    @cached_property
    def has_ema(self) -> bool:
        """Return whether the moving average of the weights is evaluated, too."""
        return any("ema_top1" in entry for entry in self.evaluations)

    @cached_property
    def selection_metric(self) -> SelectionMetric:
        """The metric that selects the best checkpoint (eval.metric), top-1 if the config can't be read."""
        config = self.config or {}
        metric = config.get("eval.metric")
        if isinstance(metric, str) and metric in METRIC_TITLES:
            return metric
        return "map" if config.get("data.multi_label") is True and self.points("eval", "map") else "top1"

    @cached_property
    def selection_values(self) -> list[tuple[int, float]]:
        """(step, value of eval.metric) of the weights that users get: the moving average if there is one."""
        return self.points("eval", f"ema_{self.selection_metric}" if self.has_ema else self.selection_metric)

    @cached_property
    def best(self) -> tuple[int, float] | None:
        """The step and the best value of eval.metric; the first of equal ones, as in `checkpoints/best`."""
        sign = -1.0 if self.selection_metric == "loss" else 1.0
        return max(self.selection_values, key=lambda point: sign * point[1], default=None)

    @cached_property
    def timeline(self) -> list[tuple[int, float | None, float | None]]:
        """(step, seconds, epoch), sorted by step, from 0 on: the wall time of all sessions and the epochs at the first
        entry of each step. What the log doesn't have is None everywhere."""
        before, seconds = 0.0, 0.0  # of earlier sessions, and of the session so far
        times: dict[int, tuple[Any, Any]] = {}
        for entry in self.all_entries:
            if entry.get("event") in _SESSION_EVENTS:
                before, seconds = before + seconds, 0.0
            if entry.get("event") in _REWIND_EVENTS:
                times = {step: time for step, time in times.items() if step <= entry["step"]}
            if _is_number(entry.get("seconds")):
                seconds = float(entry["seconds"])
                times.setdefault(entry["step"], (before + seconds, entry.get("epoch")))
            elif entry["kind"] != "event":
                times.setdefault(entry["step"], (None, entry.get("epoch")))
        has_seconds, has_epochs = (any(_is_number(time[index]) for time in times.values()) for index in (0, 1))
        complete = {
            step: (float(seconds) if has_seconds else None, float(epoch) if has_epochs else None)
            for step, (seconds, epoch) in times.items()
            if (_is_number(seconds) or not has_seconds) and (_is_number(epoch) or not has_epochs)
        }
        complete.setdefault(0, (0.0 if has_seconds else None, 0.0 if has_epochs else None))
        return [(step, *complete[step]) for step in sorted(complete)]

    @property
    def rewinds(self) -> list[dict[str, Any]]:
        """The events at which the run went back to a checkpoint."""
        return [entry for entry in self.all_entries if entry.get("event") in _REWIND_EVENTS]

    @property
    def image_sizes(self) -> dict[int, str]:
        """The height and width of the training images by the step after which they begin; empty if it is one size."""
        changes: dict[int, str] = {}
        for entry in self.entries:
            size = entry.get("image_size")
            if entry.get("event") == IMAGE_SIZE and isinstance(size, list) and all(map(_is_number, size)):
                changes[entry["step"]] = "x".join(f"{side:g}" for side in size)
        steps = sorted(changes)
        repeated = [step for before, step in pairwise(steps) if changes[step] == changes[before]]  # a resumption
        return {step: changes[step] for step in steps if step not in repeated}

    @cached_property
    def sessions(self) -> list[Session]:
        """The start and all resumptions of the run."""
        return [
            Session(
                entry["step"],
                entry["event"],
                str(entry.get("time", "")),
                {part: entry[part] for part in ("mesh", "environment") if isinstance(entry.get(part), dict)},
            )
            for entry in self.all_entries
            if entry.get("event") in _SESSION_EVENTS
        ]

    @property
    def last_setup(self) -> dict[str, Any]:
        """The mesh and the environment of the last session, in one dict."""
        setup = self.sessions[-1].setup if self.sessions else {}
        return {key: value for part in setup.values() for key, value in part.items()}

    @cached_property
    def last_step(self) -> int:
        """The last step of the log."""
        return max((entry["step"] for entry in self.entries), default=0)

    @property
    def total_steps(self) -> int | None:
        """The number of steps that the run is to have; None if it isn't logged."""
        return next((int(value) for value in reversed(self.values("total_steps"))), None)

    @property
    def num_parameters(self) -> int | None:
        """The number of parameters of the model; None if it isn't logged."""
        return next((int(value) for value in reversed(self.values("num_parameters"))), None)

    @property
    def flops_per_image(self) -> float | None:
        """The floating-point operations of training on one image; None if they aren't logged."""
        return next(reversed(self.values("train_flops_per_image")), None)

    @property
    def has_top5(self) -> bool:
        """Return whether there are more than five classes: else every image is among the top 5."""
        num_classes = (self.config or {}).get("model.num_classes")
        return not isinstance(num_classes, int | float) or num_classes > 5

    @property
    def _events(self) -> list[Any]:
        """The names of the events of the run itself, None for other entries."""
        events = [entry.get("event") for entry in self.all_entries]
        return [event for event in events if event not in (RECORDS_LOST, SINK_FAILED)]

    @property
    def has_ended(self) -> bool:
        """Return whether the log says how the run ended."""
        events = self._events
        return bool(events) and isinstance(events[-1], str) and events[-1] in END_STATES

    @property
    def state(self) -> str:
        """Return whether the run has finished, was stopped, or may be running."""
        events = self._events
        if not self.has_ended:
            return "running or killed: the log has no end"
        if events[-1] == "finished" and len(events) > 1 and events[-2] == EARLY_STOP:
            return "finished early, without an improvement"
        return END_STATES[events[-1]]

    @cached_property
    def seconds(self) -> float | None:
        """The wall time of all sessions, each until its last log entry, including undone steps; None if unknown."""
        by_session = [0.0]
        for entry in self.all_entries:
            if entry.get("event") in _SESSION_EVENTS:
                by_session.append(0.0)
            elif _is_number(entry.get("seconds")):
                by_session[-1] = float(entry["seconds"])
        return sum(by_session) or None

    @cached_property
    def images_per_s(self) -> float | None:
        """The median over the log steps; None if there are none."""
        values = [value for _, value in self.points("train", "images_per_s")]
        return statistics.median(values) if values else None

    @cached_property
    def mfu(self) -> float | None:
        """The median model FLOPs utilization (0-1) over the log steps; None where the device's peak is unknown."""
        values = [value for _, value in self.points("train", "mfu")]
        return statistics.median(values) if values else None

    @cached_property
    def peak_memory_mb(self) -> float | None:
        """The highest memory of a rank in the log; None if it isn't logged."""
        return max(self.values("memory_mb"), default=None)

    @property
    def changed_settings(self) -> list[tuple[str, Any, Any]]:
        """(key, value, default) of the settings that differ from their defaults.

        The default is None for the name and for keys that this version doesn't know.
        """
        defaults, config = _defaults(), self.config or {}
        return [(key, config[key], defaults.get(key)) for key in config if config[key] != defaults.get(key)]


def read_run(run_dir: Path, name: str | None = None) -> RunLogData:
    """Read the folder of a run. `name` is the one to show (default: the folder's).

    Raise UserError if the folder isn't a run's, or its log is still empty.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise UserError(
            f"{run_dir}: is not the folder of a run (it has no {METRICS_FILE}); name one such as output/quickstart"
        )
    all_entries, num_unread_lines = _read_entries(path)
    entries = latest_run(all_entries)
    if newer := next(filter(None, (newer_format(entry.get("format"), METRICS_FORMAT) for entry in entries)), None):
        raise UserError(f"{path}: {newer}; write the report with that version")
    if not entries and not num_unread_lines:
        raise UserError(f"{path}: has no entries yet; wait for the first log step, or name another run")
    text, config = _read_config(run_dir / "config.yaml")
    analysis = _read_error_analysis(run_dir / EVALUATION_FILE)
    run = RunLogData(name or run_dir.resolve().name, entries, config, text, analysis, num_unread_lines)
    if analysis is not None and analysis.step not in [entry["step"] for entry in run.evaluations]:
        return replace(run, error_analysis=None)  # it is left from an earlier run in the same folder
    return run


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the entries of a metrics.jsonl; skip lines that a killed run left incomplete, and unknown ones."""
    return _read_entries(path)[0]


def _read_entries(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the entries of a metrics.jsonl, whatever bytes it has, and the number of lines that are none."""
    entries: list[dict[str, Any]] = []
    num_unread = 0
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            is_complete = line.endswith(b"\n") or len(line) < _MAX_LINE_BYTES
            while not is_complete:  # read to the end of the line without keeping it
                rest = file.readline(_MAX_LINE_BYTES)
                line, is_complete = b"", not rest or rest.endswith(b"\n")
            entry = _parse_entry(line)
            if entry is None:
                num_unread += 1
            else:
                entries.append(entry)
    return entries, num_unread


def _parse_entry(line: bytes) -> dict[str, Any] | None:
    """Return the entry of a line, with usable values only (see `_usable`), or None if the line isn't one."""
    try:
        entry = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str) or type(entry.get("step")) is not int:
        return None
    return _usable(entry) if 0 <= entry["step"] <= _MAX_STEP else None


def _usable(value: Any, depth: int = 0) -> Any:
    """Return a JSON value in which numbers that aren't finite or exceed _MAX_NUMBER are None, as in entries without
    them, and in which lists and objects are at most _MAX_DEPTH deep."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if abs(value) <= _MAX_NUMBER else None  # NaN is not
    if isinstance(value, dict | list) and depth == _MAX_DEPTH:
        return "..."
    if isinstance(value, dict):
        return {key: _usable(item, depth + 1) for key, item in value.items()}
    return [_usable(item, depth + 1) for item in value] if isinstance(value, list) else value


def latest_run(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of the latest run, without those of earlier runs in the same folder (--resume never)."""
    starts = [index for index, entry in enumerate(entries) if entry.get("event") == "started"]
    return entries[starts[-1] :] if starts else entries


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)  # finite: see `_usable`


def _read_config(path: Path) -> tuple[str, dict[str, Any] | None]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", None
    try:
        values = read_yaml(text)
    except YamlError:
        return text, None
    return text, _defaults() | _flat(values) if isinstance(values, dict) else None


def _defaults() -> dict[str, Any]:
    return _flat(Config(name="run").model_dump(mode="json", by_alias=True)) | {"name": None}


def _flat(values: dict[Any, Any]) -> dict[str, Any]:
    """Flatten the sections of a config to section.key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{subkey}": subvalue for subkey, subvalue in value.items()}
        else:
            flat[str(key)] = value
    return flat


def _read_error_analysis(path: Path) -> ErrorAnalysis | None:
    """Return None if there is no analysis, or a damaged one. Raise UserError for one of a newer version."""
    try:
        content = path.read_bytes()
        return ErrorAnalysis.model_validate_json(content)
    except OSError:
        return None
    except ValidationError:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            return None
        if newer := newer_format(values.get("format") if isinstance(values, dict) else None, 1):
            raise UserError(f"{path}: {newer}; write the report with that version") from None
        return None

"""What a run's folder says of the run: its log, without what was undone; its config; its mistakes."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vit_static.common.errors import UserError
from vit_static.config.schema import Config
from vit_static.config.yaml_loader import YamlError, read_yaml
from vit_static.report.error_analysis import EVALUATION_FILE, ErrorAnalysis

METRICS = "metrics.jsonl"
ENDS = {
    "finished": "finished",
    "stopped": "stopped on request",
    "bad image": "stopped at an image that can't be read",
    "not saved": "stopped: no checkpoint could be written",
    "not finite": "stopped: gradients that are not finite",
}
_BEGINNINGS, _BACK = ("started", "resumed"), ("resumed", "rolled back")


@dataclass(frozen=True)
class Session:
    """What a run recorded when it was started, or went on: `facts` of its mesh and its environment."""

    step: int
    event: str
    time: str
    facts: dict[str, dict[str, Any]]  # mesh, environment


@dataclass(frozen=True)
class RunLogData:
    """`all_entries` are the log's since the run was last begun anew."""

    name: str
    all_entries: list[dict[str, Any]]
    config: dict[str, Any] | None  # by section.key, keys of later versions by default; None where it can't be read
    config_text: str
    mistakes: ErrorAnalysis | None  # of its last evaluation

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """Without what was undone when the run went back to a checkpoint."""
        kept: list[dict[str, Any]] = []
        for entry in self.all_entries:
            if entry.get("event") in _BACK:
                kept = [one for one in kept if one["kind"] == "event" or one["step"] <= entry["step"]]
            kept.append(entry)
        return kept

    def points(self, kind: str, key: str) -> list[tuple[int, float]]:
        """(step, value), by step; of a step that is there twice, the last. Values that are no numbers are left out."""
        found: dict[int, Any] = {entry["step"]: entry.get(key) for entry in self._of_kind(kind)}
        return sorted((step, float(value)) for step, value in found.items() if _is_number(value))

    def _of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["kind"] == kind]

    def values(self, key: str) -> list[float]:
        """All that the log has, in its order."""
        return [float(entry[key]) for entry in self.all_entries if _is_number(entry.get(key))]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return list({entry["step"]: entry for entry in self._of_kind("eval")}.values())

    @cached_property
    def is_averaged(self) -> bool:
        """Whether a moving average is evaluated beside the weights."""
        return any("ema_top1" in entry for entry in self.evaluations)

    @cached_property
    def judged(self) -> list[tuple[int, float]]:
        """Top-1 of what people will use: of the moving average where there is one."""
        return self.points("eval", "ema_top1" if self.is_averaged else "top1")

    @cached_property
    def best(self) -> tuple[int, float] | None:
        """Step and top-1; of equal ones the first, as `checkpoints/best`."""
        return max(self.judged, key=lambda point: point[1], default=None)

    @property
    def gone_back(self) -> list[dict[str, Any]]:
        return [entry for entry in self.all_entries if entry.get("event") in _BACK]

    @cached_property
    def sessions(self) -> list[Session]:
        return [
            Session(
                entry["step"],
                entry["event"],
                str(entry.get("time", "")),
                {part: found for part in ("mesh", "environment") if isinstance(found := entry.get(part), dict)},
            )
            for entry in self.all_entries
            if entry.get("event") in _BEGINNINGS
        ]

    @property
    def last_facts(self) -> dict[str, Any]:
        """Of the mesh and the environment of its last beginning."""
        of_last = self.sessions[-1].facts if self.sessions else {}
        return {key: value for part in of_last.values() for key, value in part.items()}

    @cached_property
    def last_step(self) -> int:
        return max((entry["step"] for entry in self.entries), default=0)

    @property
    def total_steps(self) -> int | None:
        return next((int(value) for value in reversed(self.values("total_steps"))), None)

    @property
    def num_parameters(self) -> int | None:
        return next((int(value) for value in reversed(self.values("num_parameters"))), None)

    @property
    def state(self) -> str:
        last = self.all_entries[-1].get("event")
        return ENDS.get(last if isinstance(last, str) else "", "under way, or killed: its end is not in its log")

    @cached_property
    def seconds(self) -> float | None:
        """Since its beginning, over all its sessions, each as far as its log goes; what was undone counts."""
        of_sessions = [0.0]
        for entry in self.all_entries:
            if entry.get("event") in _BEGINNINGS:
                of_sessions.append(0.0)
            elif _is_number(entry.get("seconds")):
                of_sessions[-1] = float(entry["seconds"])
        return sum(of_sessions) or None

    @cached_property
    def images_per_s(self) -> float | None:
        """The log steps' median."""
        values = [value for _, value in self.points("train", "images_per_s")]
        return statistics.median(values) if values else None

    @cached_property
    def peak_memory_mb(self) -> float | None:
        return max(self.values("memory_mb"), default=None)

    @property
    def differences(self) -> list[tuple[str, Any, Any]]:
        """(key, value, default) of the keys that aren't what they are by default; a key that this version doesn't know
        has no default, as the name has none."""
        defaults, config = _defaults(), self.config or {}
        return [(key, config[key], defaults.get(key)) for key in config if config[key] != defaults.get(key)]


def read_run(run_dir: Path, name: str | None = None) -> RunLogData:
    """Raises UserError where the folder is no run's, or its log has nothing yet."""
    path = run_dir / METRICS
    if not path.is_file():
        raise UserError(f"{run_dir}: no run's folder, which has a {METRICS}; name one such as output/quickstart")
    entries = latest_run(read_metrics(path))
    if not entries:
        raise UserError(f"{path}: has no line of a run yet; wait for the first, or name another run")
    text, config = _config(run_dir / "config.yaml")
    run = RunLogData(name or run_dir.resolve().name, entries, config, text, _mistakes(run_dir / EVALUATION_FILE))
    if run.mistakes is not None and run.mistakes.step not in [entry["step"] for entry in run.evaluations]:
        return RunLogData(run.name, run.all_entries, run.config, run.config_text, None)  # an earlier run's
    return run


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that a killed run has left unfinished, or that is none of a run's."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("kind"), str) and type(entry.get("step")) is int:
            entries.append(entry)
    return entries


def latest_run(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those of runs in the same folder before it was begun anew (--resume never)."""
    begun = [place for place, entry in enumerate(entries) if entry.get("event") == "started"]
    return entries[begun[-1] :] if begun else entries


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _config(path: Path) -> tuple[str, dict[str, Any] | None]:
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
    """By section.key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{below}": of_key for below, of_key in value.items()}
        else:
            flat[str(key)] = value
    return flat


def _mistakes(path: Path) -> ErrorAnalysis | None:
    try:
        return ErrorAnalysis.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None

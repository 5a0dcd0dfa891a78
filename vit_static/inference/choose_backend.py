"""Choice of the backend that runs an export: the fastest on this machine that agrees with the checked program.

The measurement takes about a second, and its result is kept in the user's cache directory by CPU, cores, versions and
model.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common.cpu import cpu_flags, cpu_model
from vit_static.common.errors import PredictError
from vit_static.common.io import cache_dir, file_record, write_json
from vit_static.config.schema import BackendChoice, InferencePrecision
from vit_static.inference.artifact import MODEL_FILE, ONNX_FILE, REMEDY, ModelSpec
from vit_static.inference.backends import (
    BACKEND_TITLES,
    Backend,
    Session,
    checked_precision,
    default_backend,
    has_gpu,
    is_installed,
    session_factory,
)

MEASURED_BATCH_SIZE = 8  # at most
_BACKENDS: dict[InferencePrecision, tuple[Backend, ...]] = {
    "float32": ("paddle", "onnxruntime", "openvino"),
    "bfloat16": ("paddle",),
    "float16": ("paddle",),
    "int8": ("onnxruntime", "openvino"),
}
_LEAST_GAIN = 1.03  # by which another backend must be faster than the default one
_MAX_ROUNDS, _MAX_SECONDS = 7, 2.0  # of the measurement; two rounds are always measured
_NUM_CHECK_IMAGES = 4
# Largest difference of a logit for an export that has no comparison with the trained model: float32's bound of `export`
_LOGIT_BOUND = 1e-4
_FORMAT, _MAX_ENTRIES = 1, 200  # of the cache


@dataclass(frozen=True)
class Chosen:
    """A backend, the function that opens its sessions, and why it was chosen (for messages; may be empty)."""

    backend: Backend
    open_session: Callable[[], Session]
    reason: str


def choose_backend(
    folder: Path,
    spec: ModelSpec,
    requested: BackendChoice,
    precision: InferencePrecision | None,
    num_threads: int,
    *,
    onednn: bool = True,
    batch_size: int = MEASURED_BATCH_SIZE,
) -> Chosen:
    """Return the requested backend, or for `auto` the one that runs batches of `batch_size` images fastest.

    A backend that reads the ONNX file must agree with the program that `export` compared with the trained model, within
    the bound of that comparison. Raises PredictError for a request that can't be met; `auto` then uses the others.
    """
    chosen = checked_precision(spec, folder, precision)
    default = default_backend(chosen)

    def factory(backend: Backend) -> Callable[[], Session]:
        return session_factory(folder, spec, backend, chosen, num_threads, onednn=onednn)

    if requested != "auto":
        if (obstacle := _obstacle(folder, spec, requested, chosen)) is not None:
            raise PredictError(f"{folder}: {obstacle}")
        open_session = factory(requested)
        if requested != default:
            difference = _difference(spec, factory(default)(), open_session())
            if not difference <= (bound := _bound(spec, chosen)):
                raise PredictError(
                    f"{folder}: in {BACKEND_TITLES[requested]} a logit differs by {difference:.1e} from the checked "
                    f"program's (bound {bound:.0e}); use --backend {default}"
                )
        return Chosen(requested, open_session, "as requested")
    possible = [backend for backend in _BACKENDS[chosen] if _obstacle(folder, spec, backend, chosen) is None]
    if possible == [default] or not onednn:
        return Chosen(default, factory(default), "")
    batch_size = max(1, min(batch_size, MEASURED_BATCH_SIZE))
    key = _cache_key(spec, chosen, possible, num_threads, batch_size)
    seconds: Any = _read_cache().get(key)
    if not _is_measurement(seconds, possible, default):
        factories = {default: factory(default)}
        for backend in set(possible) - {default}:
            with suppress(PredictError):  # it can't read the file: the reason given below says so
                factories[backend] = factory(backend)
        seconds = _measure(spec, factories, default, chosen, batch_size)
        _write_cache(key, seconds)
    best = fastest(seconds, default)
    times = ", ".join(f"{BACKEND_TITLES[name]} {1e3 * value:.1f} ms" for name, value in seconds.items())
    rejected = [BACKEND_TITLES[name] for name in possible if name not in seconds]
    note = f"; {' and '.join(rejected)} failed, or differed from the checked program" if rejected else ""
    return Chosen(best, factory(best), f"fastest here, batch {batch_size}: {times}{note}")


def fastest(seconds: Mapping[Backend, float], default: Backend) -> Backend:
    """Return the backend with the least time per batch; the default one unless another is faster by _LEAST_GAIN."""
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] * _LEAST_GAIN <= seconds[default] else default


def _obstacle(folder: Path, spec: ModelSpec, backend: Backend, precision: InferencePrecision) -> str | None:
    """Return why a backend can't run the export, with the remedy; None if it can."""
    title = BACKEND_TITLES[backend]
    if backend not in _BACKENDS[precision]:
        others = " or ".join(_BACKENDS[precision])
        return f"{title} doesn't run {precision} here; use --backend {others}, or another --precision"
    if backend == "paddle":
        return None
    if has_gpu() and precision != "int8":
        return f"{title} would run on the CPU, and this machine has a GPU; use --backend paddle"
    if ONNX_FILE not in spec.files or not (folder / ONNX_FILE).is_file():
        return f"{title} needs {ONNX_FILE}, which this export doesn't have; {REMEDY} with --onnx"
    if not is_installed(backend):
        return f"{title} is not installed; install it with 'pip install {backend}'"
    if precision != "int8" and file_record(folder / ONNX_FILE) != spec.files[ONNX_FILE]:  # int8: verified already
        return f"{ONNX_FILE} is damaged, or belongs to another export; {REMEDY} with --onnx"
    return None


def _bound(spec: ModelSpec, precision: InferencePrecision) -> float:
    """Return the largest allowed difference of a logit: that of the file's comparison with the trained model."""
    comparison = spec.comparisons.get(ONNX_FILE) or spec.comparisons.get(MODEL_FILE)
    if comparison is not None:
        return comparison.bound
    return _LOGIT_BOUND if precision == "float32" else float("inf")


def _images(spec: ModelSpec, num_images: int) -> np.ndarray:
    """Return noise in the place of preprocessed images, [B, channels, height, width] float32."""
    shape = (num_images, spec.model.num_channels, *spec.model.image_size)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _difference(spec: ModelSpec, reference: Session, other: Session) -> float:
    """Return the largest difference of a logit, or without a head of a feature; infinite if one is NaN."""
    images = _images(spec, _NUM_CHECK_IMAGES)
    outputs = []
    for session in (reference, other):
        logits, features = session.run(images, with_features=not spec.class_names)
        outputs.append(logits if features is None else features)
    difference = float(np.abs(outputs[0] - outputs[1]).max())
    return difference if np.isfinite(difference) else float("inf")


def _measure(
    spec: ModelSpec,
    factories: Mapping[Backend, Callable[[], Session]],
    default: Backend,
    precision: InferencePrecision,
    batch_size: int,
) -> dict[Backend, float]:
    """Return the least seconds per batch of each backend that agrees with the default one; they take turns."""
    sessions = {name: open_session() for name, open_session in factories.items()}
    bound = _bound(spec, precision)
    sessions = {
        name: session
        for name, session in sessions.items()
        if name == default or _difference(spec, sessions[default], session) <= bound
    }
    images = _images(spec, batch_size)
    for session in sessions.values():
        session.run(images)
    seconds: dict[Backend, float] = dict.fromkeys(sessions, float("inf"))
    started = time.perf_counter()
    for number in range(_MAX_ROUNDS):
        for name, session in sessions.items():
            before = time.perf_counter()
            session.run(images)
            seconds[name] = min(seconds[name], time.perf_counter() - before)
        if number > 0 and time.perf_counter() - started > _MAX_SECONDS:
            break
    return seconds


def _cache_key(
    spec: ModelSpec, precision: InferencePrecision, possible: list[Backend], num_threads: int, batch_size: int
) -> str:
    """Return the digest of everything that a measurement depends on: machine, versions, model and batch."""
    versions = {}
    for package in ("vit_static", "paddlepaddle", "paddlepaddle-gpu", "onnxruntime", "openvino"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    values = {
        "cpu": cpu_model(),
        "flags": sorted(cpu_flags()),
        "cores": len(os.sched_getaffinity(0)),
        "num_threads": num_threads,
        "versions": versions,
        "file": spec.files[ONNX_FILE].sha256,
        "precision": precision,
        "possible": possible,
        "batch_size": batch_size,
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_measurement(seconds: Any, possible: list[Backend], default: Backend) -> bool:
    """Return whether an entry of the cache has positive times of possible backends, the default one among them."""
    return (
        isinstance(seconds, dict)
        and default in seconds
        and set(seconds) <= set(possible)
        and all(isinstance(value, float) and value > 0.0 for value in seconds.values())
    )


def _cache_file() -> Path:
    return cache_dir() / "backends.json"


def _read_cache() -> dict[str, Any]:
    """Return the seconds per batch by key and backend; empty if there is no readable file of this format."""
    try:
        content: Any = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return {}
    entries = content.get("seconds")
    return entries if isinstance(entries, dict) else {}


def _write_cache(key: str, seconds: Mapping[Backend, float]) -> None:
    """Add a measurement; the oldest ones make room. A cache that can't be written is not an error."""
    entries = {**_read_cache(), key: dict(seconds)}
    recent = dict(list(entries.items())[-_MAX_ENTRIES:])
    with suppress(OSError):
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_json({"format": _FORMAT, "seconds": recent}, _cache_file())

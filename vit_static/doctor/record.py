"""The record of passed checks in the user's cache directory, which a run on GPUs looks up; needs no Paddle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vit_static.common.errors import newer_format
from vit_static.common.io import cache_dir, write_json
from vit_static.common.text import say
from vit_static.config.schema import Config
from vit_static.doctor.gpus import Gpu, visible_gpus

_FORMAT, _MAX_ENTRIES = 1, 200
# Keys that change neither the program nor the data pipeline: everything else identifies what was checked.
_IRRELEVANT: Mapping[str, Sequence[str] | None] = {
    "name": None,
    "output_dir": None,
    "seed": None,
    "device": None,
    "schedule": None,
    "init": None,
    "eval": None,
    "checkpoint": None,
    "log": None,
    "train": (
        *("epochs", "max_steps", "max_images", "profile_steps", "on_nonfinite", "max_rollbacks", "max_restarts"),
        *("node_timeout_s", "stop_timeout_s"),
    ),
    "parallel": ("collective_timeout_s",),
    "data": (
        "root",
        "train",
        "val",
        "on_bad_image",
        "num_threads",
        "num_readers",
        "prefetch_batches",
        "read_timeout_s",
    ),
    "optim": ("lr", "weight_decay", "decay_times_lr"),
}


def fingerprint(config: Config) -> str:
    """Return a digest of the keys that the checks depend on, 16 hexadecimal digits."""
    values = config.model_dump(mode="json", by_alias=True)
    for section, keys in _IRRELEVANT.items():
        if keys is None:
            del values[section]
        else:
            values[section] = {key: value for key, value in values[section].items() if key not in keys}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def setting(config: Config, world_size: int, gpus: Sequence[Gpu]) -> dict[str, Any]:
    """Return what a pass is valid for, as JSON values: config, ranks, GPUs, driver and version of Paddle."""
    return {
        "config": fingerprint(config),
        "world_size": world_size,
        "gpus": sorted(gpu.name for gpu in gpus),
        "drivers": sorted({gpu.driver for gpu in gpus}),
        "paddle": paddle_version(),
    }


def paddle_version() -> str:
    """Return the version of Paddle's installed build without importing it; empty if there is none."""
    for name in ("paddlepaddle-gpu", "paddlepaddle"):
        with suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    return ""


def write_pass(passed: Mapping[str, Any], config_name: str) -> None:
    """Record that all checks have passed in a setting. The oldest of _MAX_ENTRIES entries make room."""
    entries = [entry for entry in _entries() if entry.get("setting") != passed]
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    entries.append({"setting": dict(passed), "name": config_name, "time": time})
    if _newer_record() is not None:
        say(f"{_newer_record()}, so this pass isn't recorded there")
        return
    write_json({"format": _FORMAT, "passes": entries[-_MAX_ENTRIES:]}, _record_file())


def has_passed(current: Mapping[str, Any]) -> bool:
    """Return whether all checks have passed in a setting."""
    return any(entry.get("setting") == current for entry in _entries())


def notice(config: Config, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the line with which a run starts on GPUs on which the doctor hasn't passed with its config; else None.

    Ask on rank 0 only, after the device has turned out to be a GPU.
    """
    gpus = visible_gpus(environ)
    world_size = int(environ.get("PADDLE_TRAINERS_NUM", "1"))
    if has_passed(setting(config, world_size, gpus)):
        return None
    if (newer := _newer_record()) is not None:
        return f"{newer}, so it isn't known whether these GPUs have passed './run.sh doctor' with this config"
    return "these GPUs haven't passed './run.sh doctor' with this config, driver and version of Paddle; run it first"


def _record_file() -> Path:
    return cache_dir() / "doctor.json"


def _newer_record() -> str | None:
    """Return what to say about a record of a newer version; None if it isn't one."""
    content = _content()
    newer = newer_format(content.get("format"), _FORMAT) if isinstance(content, dict) else None
    return newer and f"{_record_file()}: {newer}"


def _content() -> Any:
    """Return the JSON in the record; None if it is missing or damaged."""
    try:
        return json.loads(_record_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _entries() -> list[dict[str, Any]]:
    """Return the recorded entries; none from a file that is missing or damaged, which the next pass replaces."""
    content = _content()
    entries = content.get("passes") if isinstance(content, dict) else content  # a list before there were formats
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []

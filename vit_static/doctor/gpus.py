"""The visible GPUs as nvidia-smi reports them; needs no Paddle."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

_FIELDS = ("index", "uuid", "name", "driver_version", "compute_cap", "memory.total", "memory.free")
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    name: str
    driver: str  # version
    capability: tuple[int, int]  # compute capability: major, minor
    total_bytes: int
    free_bytes: int


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves visible, in its order; none if nvidia-smi fails.

    Entries are numbers of nvidia-smi's order, or the beginning of a UUID. As in CUDA, the entries after an invalid one
    count for nothing.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[value.strip() for value in line.split(",")] for line in listing.splitlines()]
    rows = [row for row in rows if len(row) == len(_FIELDS)]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible != "all":
        rows = _selected(rows, visible)
    return [_gpu(row) for row in rows]


def _selected(rows: list[list[str]], visible: str) -> list[list[str]]:
    selected = []
    for entry in (part.strip() for part in visible.split(",")):
        matches = [row for row in rows if entry and (row[0] == entry or row[1].startswith(entry))]
        if len(matches) != 1:
            break
        selected += matches
    return selected


def _gpu(row: list[str]) -> Gpu:
    _, _, name, driver, capability, total_mib, free_mib = row
    major, _, minor = capability.partition(".")
    return Gpu(name, driver, (_int(major), _int(minor)), _int(total_mib) * 2**20, _int(free_mib) * 2**20)


def _int(text: str) -> int:
    """Return a number, or 0 where nvidia-smi prints [N/A]."""
    return int(text) if text.isascii() and text.isdigit() else 0

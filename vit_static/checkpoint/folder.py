"""Checkpoint folders on disk: names, atomic commit, retention, recovery and reading.

A checkpoint is a folder, ``checkpoints/step_00001234``, which is complete or absent. It holds one file of the training
state per rank (sharded_state.py), the config, the class names, meta.json with the progress, and a manifest with the
size and digest of each of these files. The links `latest` and `best` are next to it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from vit_static.checkpoint.progress import Manifest, Progress
from vit_static.checkpoint.sharded_state import ShardedReader, read_shard_metadata
from vit_static.common.errors import WeightsError, format_value, newer_format, truncate
from vit_static.common.io import fsync, replace_symlink, write_json, write_text
from vit_static.common.text import display_name

FORMAT = 4  # raise it when a file of a checkpoint changes its meaning; other formats are refused in one line
META, CONFIG, CLASS_NAMES, MANIFEST = "meta.json", "config.yaml", "class_names.txt", "manifest.json"
MERGED, MERGED_AVERAGE = "model.pdparams", "model_ema.pdparams"  # the last weights, and their moving average
MERGED_BEST, MERGED_BEST_AVERAGE = "model_best.pdparams", "model_best_ema.pdparams"  # if the best are not the last
MERGED_FILES = (MERGED, MERGED_AVERAGE, MERGED_BEST, MERGED_BEST_AVERAGE)


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def shard_name(rank: int) -> str:
    """Return the file name of a rank's shard of the training state."""
    return f"rank_{rank:05d}.safetensors"


def is_checkpoint(path: Path) -> bool:
    """Tell whether a folder is a checkpoint of this or another format, complete or not."""
    return (path / MANIFEST).is_file() or (path / META).is_file()


def numbered_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return a run's checkpoints with their steps, the earliest first. `checkpoints` is the folder they are in."""
    return sorted((int(path.name[5:]), path) for path in checkpoints.glob("step_*") if path.name[5:].isdecimal())


def best_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint with a run's best result; None if there is none."""
    link = run_dir / "checkpoints" / "best"
    return link.resolve() if link.is_dir() else None


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run; None if there is none."""
    checkpoints = numbered_checkpoints(run_dir / "checkpoints")
    return checkpoints[-1][1] if checkpoints else None


# -- writing --------------------------------------------------------------------------------------------------------


def write_class_names(folder: Path, class_names: Iterable[str]) -> None:
    """Write class_names.txt: one name per line, in the order of the labels."""
    write_text("".join(f"{display_name(name)}\n" for name in class_names), folder / CLASS_NAMES)


def commit_checkpoint(unfinished: Path, final: Path, manifest: Manifest) -> None:
    """Turn a folder with all of a checkpoint's files into that checkpoint: write the manifest and rename the folder.

    Replaces an earlier checkpoint of the same step, which there is after a resume from before it.
    """
    write_json({"format": FORMAT, **asdict(manifest)}, unfinished / MANIFEST)
    fsync(unfinished)
    replaced = final.with_name(f".{final.name}.older")
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    fsync(final.parent)
    remove_checkpoint(replaced)
    replace_symlink(final.parent / "latest", final.name)


def remove_old(checkpoints: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove all checkpoints but the last `keep_last`, the multiples of `keep_every` steps, `latest` and `best`."""
    linked = {(checkpoints / link).resolve().name for link in ("latest", "best") if (checkpoints / link).exists()}
    for step, path in numbered_checkpoints(checkpoints)[:-keep_last]:
        if path.name not in linked and (keep_every is None or step % keep_every):
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint's folder, if it exists. If interrupted, nothing remains that could be taken for one."""
    if path.is_dir():
        removed = path.with_name(f".{path.name.strip('.')}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def recover_interrupted(run_dir: Path, progress: Progress) -> None:
    """Complete or remove what a killed run has left half done, and set the links `latest` and `best`."""
    checkpoints = run_dir / "checkpoints"
    for replaced in checkpoints.glob(".step_*.older"):
        if not (final := replaced.with_name(replaced.name[1:].removesuffix(".older"))).exists():
            replaced.rename(final)
    for path in (*checkpoints.glob(".step_*"), *checkpoints.glob(".latest.*"), *checkpoints.glob(".best.*")):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    best = None if progress.best_step is None else checkpoint_dir(run_dir, progress.best_step)
    for link, target in (("latest", latest_checkpoint(run_dir)), ("best", best)):
        if target is not None and target.is_dir():
            replace_symlink(checkpoints / link, target.name)


def archive(run_dir: Path, after: int = -1) -> Path | None:
    """Move a run's checkpoints after step `after`, and its merged weights, to a new folder `checkpoints_before_N`.

    For a run that starts again or goes back to an earlier step; nothing is deleted. Returns the new folder, or None if
    there was nothing to move.
    """
    checkpoints = run_dir / "checkpoints"
    moved = [path for step, path in numbered_checkpoints(checkpoints) if step > after]
    moved += [run_dir / merged for merged in MERGED_FILES if (run_dir / merged).exists()]
    if not moved:
        return None
    number = 1
    while (target := run_dir / f"checkpoints_before_{number}").exists():
        number += 1
    target.mkdir()
    for path in moved:
        path.rename(target / path.name)
    for link in ("latest", "best"):
        if (checkpoints / link).is_symlink() and not (checkpoints / link).exists():
            (checkpoints / link).unlink()
    return target


# -- reading --------------------------------------------------------------------------------------------------------


def format_of(path: Path, *, with_shards: bool = False) -> Any:
    """Return the format number in a checkpoint's files: an int, if they are undamaged; None if there is none.

    It is the manifest's, or without a manifest that of meta.json, as format 2 had it; but if any file is of a newer
    format, even one only, it is that one. `with_shards` also reads the headers of the ranks' files.
    """
    formats = [_format_in(path / name) for name in (MANIFEST, META)]
    if with_shards:
        formats += [shard_format(shard) for shard in sorted(path.glob("rank_*.safetensors"))]
    newer = [number for number in formats if newer_format(number, FORMAT)]
    if newer:
        return newer[0]
    return formats[0] if (path / MANIFEST).exists() else formats[1]


def _format_in(file: Path) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content.get("format") if isinstance(content, dict) else None


def shard_format(path: Path) -> int | None:
    """Return the format number in the header of a rank's file; None if there is none, as before it was recorded."""
    number = read_shard_metadata(path).get("format", "")
    return int(number) if number.isascii() and number.isdigit() and len(number) < 10 else None


def is_other_format(saved_format: Any) -> bool:
    """Tell whether a format number is that of another version's checkpoints."""
    return type(saved_format) is int and saved_format != FORMAT


def read_manifest(path: Path) -> Manifest:
    """Read and check a checkpoint's manifest. Raises WeightsError if it is missing, damaged or of another format."""
    file, saved_format = path / MANIFEST, format_of(path)
    if newer := newer_format(saved_format, FORMAT):
        raise WeightsError(f"{path}: {newer}")
    if is_other_format(saved_format):
        raise WeightsError(
            f"{path}: is a checkpoint of format {format_value(saved_format)}, and this version reads format {FORMAT}"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("it has no format number")
        manifest = TypeAdapter(Manifest).validate_python(content)
    except FileNotFoundError:
        raise WeightsError(f"{path}: is an incomplete checkpoint: its {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{file}: is damaged ({truncate(str(error))})") from None
    if {META, CONFIG, CLASS_NAMES} - manifest.files.keys() or any(Path(name).name != name for name in manifest.files):
        raise WeightsError(f"{file}: is damaged (it doesn't list the files of a checkpoint)")
    return manifest


def open_shards(path: Path) -> ShardedReader:
    """Open a checkpoint's training state, whatever mesh has written it. Raises WeightsError."""
    return ShardedReader(path / name for name in read_manifest(path).files if name.endswith(".safetensors"))

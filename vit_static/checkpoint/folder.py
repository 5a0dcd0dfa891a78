"""Checkpoints: what their folders hold, which of them a run goes on from, whether one is whole, weights out of it.

A checkpoint is a folder, ``checkpoints/step_00001234``, complete or absent (saving.py): a part of the state from each
rank (state_parts.py), the config, the classes, where the run stands, and a manifest with the size and the digest of
each of these files. `latest` and `best` are links beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from vit_static.checkpoint.progress import FileRecord, Manifest, Progress
from vit_static.checkpoint.sharded_state import ShardedReader
from vit_static.common.errors import WeightsError, truncate
from vit_static.common.io import fsync, replace_symlink, write_atomically, write_json

FORMAT = 3
META, CONFIG, CLASS_NAMES, MANIFEST = "meta.json", "config.yaml", "class_names.txt", "manifest.json"
MERGED, MERGED_AVERAGE = "model.pdparams", "model_ema.pdparams"
_PART = "rank_{:05d}.safetensors"


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def shard_name(rank: int) -> str:
    return _PART.format(rank)


# -- written --------------------------------------------------------------------------------------------------------


def file_record(path: Path) -> FileRecord:
    """A file's size and digest."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, _digest(file))


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def commit_checkpoint(part: Path, final: Path, manifest: Manifest) -> None:
    """Makes a checkpoint of a folder with all of its files: the manifest goes into it, and it gets its name."""
    content = {"format": FORMAT, **asdict(manifest)}
    write_json(content, part / MANIFEST)
    fsync(part)
    older = final.with_name(f".{final.name}.older")
    if final.exists():  # the same step again, after a resume
        final.rename(older)
    part.rename(final)
    fsync(final.parent)
    remove_checkpoint(older)
    replace_symlink(final.parent / "latest", final.name)


def remove_old(checkpoints: Path, keep_last: int, keep_every: int | None) -> None:
    """All but the newest, those of every so many steps, and those that `latest` and `best` name."""
    named = {(checkpoints / link).resolve().name for link in ("latest", "best") if (checkpoints / link).exists()}
    for step, path in sorted(_numbered_checkpoints(checkpoints))[:-keep_last]:
        if path.name not in named and (keep_every is None or step % keep_every):
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """A checkpoint: one that is killed meanwhile leaves nothing that looks like one."""
    if path.is_dir():
        going = path.with_name(f".{path.name.strip('.')}.removed")
        shutil.rmtree(going, ignore_errors=True)
        path.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def _numbered_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """A run's checkpoints by their steps."""
    return [(int(path.name[5:]), path) for path in checkpoints.glob("step_*") if path.name[5:].isdecimal()]


def recover_interrupted(run_dir: Path, progress: Progress) -> None:
    """Before a run goes on: what a killed one has left half done is removed, or done."""
    checkpoints = run_dir / "checkpoints"
    for older in checkpoints.glob(".step_*.older"):
        if not (final := older.with_name(older.name[1:].removesuffix(".older"))).exists():
            older.rename(final)
    for path in (*checkpoints.glob(".step_*"), *checkpoints.glob(".latest.*"), *checkpoints.glob(".best.*")):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    best = None if progress.best_step is None else checkpoint_dir(run_dir, progress.best_step)
    for link, target in (("latest", latest_checkpoint(run_dir)), ("best", best)):
        if target is not None and target.is_dir():
            replace_symlink(checkpoints / link, target.name)


def archive(run_dir: Path, after: int = -1) -> Path | None:
    """Moves a run's checkpoints of later steps than `after`, and its merged weights, out of the way of one that begins
    anew or goes back; nothing is deleted. Where to, if there were any."""
    checkpoints = run_dir / "checkpoints"
    later = [path for step, path in _numbered_checkpoints(checkpoints) if step > after]
    later += [run_dir / merged for merged in (MERGED, MERGED_AVERAGE) if (run_dir / merged).exists()]
    if not later:
        return None
    number = 1
    while (aside := run_dir / f"checkpoints_before_{number}").exists():
        number += 1
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    for link in ("latest", "best"):
        if (checkpoints / link).is_symlink() and not (checkpoints / link).exists():
            (checkpoints / link).unlink()
    return aside


# -- found and looked at --------------------------------------------------------------------------------------------


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if it has one."""
    return max(_numbered_checkpoints(run_dir / "checkpoints"), default=(0, None))[1]


def read_manifest(path: Path) -> Manifest:
    """Raises WeightsError for what is no checkpoint of this version's."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        manifest = TypeAdapter(Manifest).validate_python(content)
        if {META, CONFIG, CLASS_NAMES} - manifest.files.keys() or any(
            Path(name).name != name for name in manifest.files
        ):
            raise ValueError("its files are not a checkpoint's")
        return manifest
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path / MANIFEST}: is damaged, or not this version's ({truncate(str(error))})") from None
    try:
        older = json.loads((path / META).read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError):
        older = FORMAT
    if older == FORMAT:
        raise WeightsError(f"{path}: is not a whole checkpoint, its {MANIFEST} is missing")
    raise WeightsError(
        f"{path}: is of format {older}, and this version's is {FORMAT}; go on with the version that wrote it, or start "
        f"from the weights that its run has merged at its end ({MERGED}) with -o init.from=PATH -o init.head=keep"
    )


def open_shards(path: Path) -> ShardedReader:
    return ShardedReader(path / name for name in read_manifest(path).files if name.endswith(".safetensors"))


def write_class_names(folder_path: Path, class_names: Iterable[str]) -> None:
    """A line a class, in the order of the labels."""
    with write_atomically(folder_path / CLASS_NAMES) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")

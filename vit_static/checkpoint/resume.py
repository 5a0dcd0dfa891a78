"""Choose, verify and compare the checkpoint that a run resumes from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from vit_static.checkpoint.folder import (
    CONFIG,
    MANIFEST,
    META,
    _numbered_checkpoints,
    file_record,
    latest_checkpoint,
    read_manifest,
)
from vit_static.checkpoint.progress import DataPosition, Manifest, Progress
from vit_static.checkpoint.sharded_state import read_shard_metadata
from vit_static.common.errors import ConfigError, WeightsError, truncate
from vit_static.config.loader import load_config
from vit_static.config.schema import Config


def resolve_resume(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from. `resume`: auto, the run's own latest, if there is one; never; or the path of a
    checkpoint or a run. Raises WeightsError where that path is neither."""
    if resume == "never":
        return None
    if resume == "auto":
        return latest_checkpoint(run_dir)
    path = Path(resume)
    found = path if (path / MANIFEST).is_file() or (path / META).is_file() else latest_checkpoint(path)
    if found is None:
        raise WeightsError(f"--resume {resume}: is no checkpoint, and no run's folder that has one")
    return found.resolve()


def verify_files(path: Path, share: slice = slice(None)) -> Manifest:
    """Compares a checkpoint's files with its manifest by every byte, but of the ranks' parts only a `share`. Raises
    WeightsError, which names what is missing, cut short, damaged or another's."""
    manifest = read_manifest(path)
    parts = sorted(name for name in manifest.files if name.endswith(".safetensors"))
    left_to_others = set(parts) - set(parts[share])
    for name, wanted in sorted(manifest.files.items()):
        file = path / name
        try:
            size = file.stat().st_size
            if size == wanted.bytes and name in left_to_others:
                continue
            if size == wanted.bytes and file_record(file) == wanted:
                continue
        except FileNotFoundError:
            raise WeightsError(f"{file}: is missing, so the checkpoint is not whole") from None
        except OSError as error:
            raise WeightsError(f"{file}: can't be read ({error.strerror})") from None
        about = read_shard_metadata(file)
        if about and (about.get("run"), about.get("step")) != (manifest.run, str(manifest.step)):
            what = "another run" if about.get("run") != manifest.run else f"step {about.get('step')}"
            raise WeightsError(f"{file}: is a part of {what}'s checkpoint")
        if size != wanted.bytes:
            raise WeightsError(f"{file}: has {size} bytes, and was written with {wanted.bytes}")
        raise WeightsError(f"{file}: is damaged: its bytes are not those that were written")
    return manifest


def suggest_fallback(path: Path) -> str:
    """What can be done about a checkpoint that isn't whole."""
    for _, other in sorted(_numbered_checkpoints(path.resolve().parent), reverse=True):
        if other.name < path.resolve().name:
            try:
                verify_files(other)
            except WeightsError:
                continue
            return f"the newest whole one before it is {other}; a run goes on from there with --resume {other}"
    return "there is no whole one before it; a run begins anew with --resume never"


def read_progress(path: Path) -> tuple[Progress, DataPosition]:
    """Raises WeightsError for what is not a checkpoint of this version's."""
    read_manifest(path)
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        progress = TypeAdapter(Progress).validate_python(meta["progress"])
        return progress, TypeAdapter(DataPosition).validate_python(meta["data"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path / META}: is damaged ({truncate(str(error))})") from None


def check_same_images(path: Path, saved: DataPosition, now: DataPosition) -> None:
    """Raises ConfigError where the images that a checkpoint's run was in the midst of are not those there now."""
    if saved == now:
        return
    differs = next(name for name, value in asdict(saved).items() if asdict(now)[name] != value)
    what = {
        "position": f"stands at image {saved.position} of its order, and this run would go on at {now.position}",
        "num_images": f"was trained on {saved.num_images} images, and there are {now.num_images}",
        "images": f"was trained on as many images ({saved.num_images}) of other names or labels",
    }.get(differs, f"has {differs} = {getattr(saved, differs)}, not {getattr(now, differs)}")
    raise ConfigError(
        f"{path}: {what}; an order can't be gone on with on other terms: bring back what was, or start from these "
        f"weights with -o init.from={path} -o init.head=keep -o name=..."
    )


def check_same_run(path: Path, config: Config) -> None:
    """Raises ConfigError where a run can't go on from a checkpoint because what it trains has changed."""
    saved, now = _fixed_values(load_config(path / CONFIG)), _fixed_values(config)
    changed = [f"{key} = {value!r} (it was {saved[key]!r})" for key, value in now.items() if saved[key] != value]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: a run can't go on from {path} with that changed; "
            "give this one another name (-o name=...), or start anew with --resume never"
        )


def _fixed_values(config: Config) -> dict[str, Any]:
    """What must not change within a run: the model, the optimizer's kind, and the order of the images."""
    model = {f"model.{key}": value for key, value in config.model.model_dump(mode="json").items()}
    order = {
        "seed": config.seed,
        "data.global_batch_size": config.data.global_batch_size,
        "augment.repeated_aug": config.augment.repeated_aug,
    }
    training = {
        "optim.name": config.optim.name,
        "optim.ema_decay > 0": config.optim.ema_decay > 0.0,
        "train.freeze": config.train.freeze,
    }
    return {**model, **training, **order}

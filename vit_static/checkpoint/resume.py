"""Choice, verification and comparison of the checkpoint that a run resumes from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from vit_static.checkpoint.folder import (
    CONFIG,
    FORMAT,
    MERGED,
    META,
    format_of,
    is_checkpoint,
    is_other_format,
    latest_checkpoint,
    numbered_checkpoints,
    read_manifest,
    shard_format,
)
from vit_static.checkpoint.progress import DataPosition, KernelRecord, LoraBase, Manifest, Progress, TeacherRecord
from vit_static.checkpoint.sharded_state import read_shard_metadata
from vit_static.common.errors import ConfigError, WeightsError, newer_format, os_reason, truncate
from vit_static.common.io import FileRecord, file_record
from vit_static.common.text import counted
from vit_static.config.loader import load_config
from vit_static.config.schema import Config


def resolve_resume(run_dir: Path, resume: str) -> Path | None:
    """Return the checkpoint to resume from; None to start from the beginning.

    `resume` is "auto" (the run's own latest checkpoint, if it has one), "never", or the path of a checkpoint or of
    another run's folder. Raises WeightsError if that path is neither.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return latest_checkpoint(run_dir)
    path = Path(resume)
    checkpoint = path if is_checkpoint(path) else latest_checkpoint(path)
    if checkpoint is None:
        raise WeightsError(
            f"--resume {resume}: no checkpoint is there; name a checkpoint (checkpoints/step_*), or the folder of a run"
            " that has one"
        )
    return checkpoint.resolve()


def verify_files(path: Path, share: slice = slice(None)) -> Manifest:
    """Compare a checkpoint's files with its manifest, by size and digest, and return the manifest.

    `share` selects the ranks' files whose digest is computed (so that ranks can divide the work); of the others only
    the size is compared. Raises WeightsError, which names the file that is missing, damaged or from elsewhere.
    """
    manifest = read_manifest(path)
    shards = sorted(name for name in manifest.files if name.endswith(".safetensors"))
    only_size = set(shards) - set(shards[share])
    for name, expected in sorted(manifest.files.items()):
        _verify_file(path / name, expected, manifest, with_digest=name not in only_size)
    return manifest


def _verify_file(path: Path, expected: FileRecord, manifest: Manifest, *, with_digest: bool) -> None:
    if with_digest and path.suffix == ".safetensors" and (newer := newer_format(shard_format(path), FORMAT)):
        raise WeightsError(f"{path}: {newer}")
    try:
        num_bytes = path.stat().st_size
        if num_bytes == expected.num_bytes and (not with_digest or file_record(path) == expected):
            return
    except FileNotFoundError:
        raise WeightsError(f"{path}: is missing, so the checkpoint is incomplete") from None
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({os_reason(error)})") from None
    metadata = read_shard_metadata(path)
    if metadata and metadata.get("run_id") != manifest.run_id:
        raise WeightsError(f"{path}: belongs to a checkpoint of another run")
    if metadata and metadata.get("step") != str(manifest.step):
        raise WeightsError(f"{path}: belongs to the checkpoint of step {truncate(metadata.get('step', '?'))}")
    if num_bytes != expected.num_bytes:
        raise WeightsError(f"{path}: is damaged: it has {num_bytes} bytes, and was written with {expected.num_bytes}")
    raise WeightsError(f"{path}: is damaged: its content is not what was written")


def suggest_fallback(path: Path) -> str:
    """Return what a user can do about a checkpoint that `verify_files` refuses, as the second half of a message."""
    if is_other_format(format_of(path, with_shards=True)):
        return (
            f"resume with the version that wrote it, or start a new run from its weights: copy {MERGED} out of the "
            "run's folder, and set -o init.from=PATH -o init.head=keep -o name=..."
        )
    for _, other in reversed(numbered_checkpoints(path.resolve().parent)):
        if other.name < path.resolve().name:
            try:
                verify_files(other)
            except WeightsError:
                continue
            return f"the newest intact checkpoint before it is {other}; resume from that with --resume {other}"
    return "there is no intact checkpoint before it; start the run again with --resume never"


def read_progress(path: Path) -> tuple[Progress, DataPosition]:
    """Read a checkpoint's progress and data position. Raises WeightsError if it is damaged or of another format."""
    read_manifest(path)
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        progress = TypeAdapter(Progress).validate_python(meta["progress"])
        return progress, TypeAdapter(DataPosition).validate_python(meta["data"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path / META}: is damaged ({truncate(str(error))})") from None


def read_teacher(path: Path) -> TeacherRecord | None:
    """Read which teacher a checkpoint's run was distilled from. Raises WeightsError if the record is damaged."""
    try:
        record = json.loads((path / META).read_text(encoding="utf-8")).get("teacher")
        return TypeAdapter(TeacherRecord | None).validate_python(record)
    except (OSError, AttributeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path / META}: is damaged ({truncate(str(error))})") from None


def read_lora_base(path: Path) -> LoraBase:
    """Read which frozen weights the checkpoint of a run with LoRA belongs to. Raises WeightsError as `read_teacher`."""
    try:
        return TypeAdapter(LoraBase).validate_python(json.loads((path / META).read_text(encoding="utf-8"))["lora_base"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path / META}: is damaged ({truncate(str(error))})") from None


def read_kernels(path: Path) -> KernelRecord | None:
    """Read the choices of kernels of a checkpoint's run; None if it has none. Raises WeightsError as `read_teacher`."""
    try:
        record = json.loads((path / META).read_text(encoding="utf-8")).get("kernels")
        return None if record is None else TypeAdapter(KernelRecord).validate_python(record)
    except (OSError, AttributeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path / META}: is damaged ({truncate(str(error))})") from None


def check_same_teacher(path: Path, saved: TeacherRecord | None, current: TeacherRecord | None) -> None:
    """Raise ConfigError if a run's teacher isn't the one of the checkpoint that it resumes from."""
    if (saved and saved.digest) == (current and current.digest):
        return
    before, now = (_describe_teacher(record) for record in (saved, current))
    raise ConfigError(
        f"{path}: was trained with {before}, and distill.teacher is now {now}: cannot resume with another teacher; set "
        f"the one of before, or start a new run from these weights with -o init.from={path} -o init.head=keep "
        "-o name=..."
    )


def _describe_teacher(record: TeacherRecord | None) -> str:
    return "no teacher" if record is None else f"the teacher {record.source} (sha256 {record.digest[:12]})"


def check_same_images(path: Path, saved: DataPosition, current: DataPosition) -> None:
    """Raise ConfigError if the training images, or their order, are not those that a checkpoint's run was using."""
    if saved == current:
        return
    changed = next(name for name, value in asdict(saved).items() if asdict(current)[name] != value)
    difference = {
        "position": f"is at image {saved.position} of the training order, and this run would continue at "
        f"{current.position}",
        "num_images": f"was trained on {counted(saved.num_images, 'image')}, and there are {current.num_images} now",
        "images_digest": f"was trained on {counted(saved.num_images, 'image')} with other names or labels",
    }.get(changed, f"was trained with {changed} = {getattr(saved, changed)}, not {getattr(current, changed)}")
    raise ConfigError(
        f"{path}: {difference}; cannot resume with a different data order: restore the images and settings of before, "
        f"or start a new run from these weights with -o init.from={path} -o init.head=keep -o name=..."
    )


def check_same_run(path: Path, config: Config) -> None:
    """Raise ConfigError if `config` and that of a checkpoint's run differ in the model, the order or the optimizer."""
    saved, current = _fixed_values(load_config(path / CONFIG)), _fixed_values(config)
    changed = [f"{key} = {value!r} (it was {saved[key]!r})" for key, value in current.items() if saved[key] != value]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: cannot resume from {path} with another value; "
            "give this run another name (-o name=...), or start it again with --resume never"
        )


def _fixed_values(config: Config) -> dict[str, Any]:
    """Return what must not change within a run: the model, the kind of optimizer, and the order of the images."""
    # Only what the model computes with: unread tokens change no weight.
    keys = config.model.model_dump(mode="json", exclude={"compute_unread_tokens"})
    model = {f"model.{key}": value for key, value in keys.items()}
    order = {
        "seed": config.seed,
        "data.global_batch_size": config.data.global_batch_size,
        "data.sampler": config.data.sampler,
        "augment.repeated_aug": config.augment.repeated_aug,
    }
    training = {
        "optim.name": config.optim.name,
        "optim.ema_decay > 0": config.optim.ema_decay > 0.0,
        # The average of schedule_free_adamw is computed with them (optim/schedule_free.py).
        "optim.betas": list(config.optim.betas) if config.optim.name == "schedule_free_adamw" else None,
        "train.freeze": config.train.freeze,
        "distill.kind": config.distill.kind,
        **{f"lora.{key}": config.lora.model_dump(mode="json")[key] for key in ("rank", "alpha", "targets")},
    }
    return {**model, **training, **order}

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from vit_static import config as config_module
from vit_static import formats
from vit_static import model as model_module
from vit_static.config import Config, ConfigError, shortened
from vit_static.data.order import nth_batch
from vit_static.files import point_to, sync, write_atomically
from vit_static.formats import Foreign, State, fuse_qkv
from vit_static.optim import EMA
from vit_static.state_parts import Parts, read_about
from vit_static.weight_files import WeightsError

FORMAT = 3
META, CONFIG, CLASS_NAMES, MANIFEST = "meta.json", "config.yaml", "class_names.txt", "manifest.json"
MERGED, MERGED_AVERAGE = "model.pdparams", "model_ema.pdparams"
_PART = "rank_{:05d}.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands; all else that it needs to go on follows from the step, the seed and the config."""

    step: Annotated[int, Field(ge=0)]  # optimizer steps done
    evaluated_step: int = 0  # after how many of them the last evaluation was
    best_top1: float | None = None
    best_step: int | None = None
    left_out: tuple[int, ...] = ()  # batches of the order that the run has passed over (train.on_nonfinite)

    def batch(self) -> int:
        """The number, in the order of the images, of the batch that comes next."""
        return nth_batch(self.step, self.left_out)


@dataclass(frozen=True)
class DataPosition:
    """Where a run stands in its images: the next one's position in the line of data/order.py, and what the line is of.

    That is all: which images come, in which order, and how each is augmented, are functions of these numbers.
    """

    position: int
    num_images: int
    images: str  # ImageSet.digest
    seed: int
    repeats: int


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint consists of. `run` is the same for all of a run's."""

    run: str
    step: int
    files: dict[str, FileRecord]


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def part_name(rank: int) -> str:
    return _PART.format(rank)


# -- written --------------------------------------------------------------------------------------------------------


def record(path: Path) -> FileRecord:
    """A file's size and digest."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, _digest(file))


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def complete(part: Path, final: Path, manifest: Manifest) -> None:
    """Makes a checkpoint of a folder with all of its files: the manifest goes into it, and it gets its name."""
    content = {"format": FORMAT, **asdict(manifest)}
    with write_atomically(part / MANIFEST) as temporary:
        temporary.write_text(json.dumps(content, indent=1))
    sync(part)
    older = final.with_name(f".{final.name}.older")
    if final.exists():  # the same step again, after a resume
        final.rename(older)
    part.rename(final)
    sync(final.parent)
    remove(older)
    point_to(final.parent / "latest", final.name)


def remove_old(checkpoints: Path, keep_last: int, keep_every: int | None) -> None:
    """All but the newest, those of every so many steps, and those that `latest` and `best` name."""
    named = {(checkpoints / link).resolve().name for link in ("latest", "best") if (checkpoints / link).exists()}
    for step, path in sorted(_numbered(checkpoints))[:-keep_last]:
        if path.name not in named and (keep_every is None or step % keep_every):
            remove(path)


def remove(path: Path) -> None:
    """A checkpoint: one that is killed meanwhile leaves nothing that looks like one."""
    if path.is_dir():
        going = path.with_name(f".{path.name.strip('.')}.removed")
        shutil.rmtree(going, ignore_errors=True)
        path.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def _numbered(checkpoints: Path) -> list[tuple[int, Path]]:
    """A run's checkpoints by their steps."""
    return [(int(path.name[5:]), path) for path in checkpoints.glob("step_*") if path.name[5:].isdecimal()]


def tidy(run_dir: Path, progress: Progress) -> None:
    """Before a run goes on: what a killed one has left half done is removed, or done."""
    checkpoints = run_dir / "checkpoints"
    for older in checkpoints.glob(".step_*.older"):
        if not (final := older.with_name(older.name[1:].removesuffix(".older"))).exists():
            older.rename(final)
    for path in (*checkpoints.glob(".step_*"), *checkpoints.glob(".latest.*"), *checkpoints.glob(".best.*")):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    best = None if progress.best_step is None else folder(run_dir, progress.best_step)
    for link, target in (("latest", latest(run_dir)), ("best", best)):
        if target is not None and target.is_dir():
            point_to(checkpoints / link, target.name)


def set_aside(run_dir: Path, after: int = -1) -> Path | None:
    """Moves a run's checkpoints of later steps than `after`, and its merged weights, out of the way of one that begins
    anew or goes back; nothing is deleted. Where to, if there were any."""
    checkpoints = run_dir / "checkpoints"
    later = [path for step, path in _numbered(checkpoints) if step > after]
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


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if it has one."""
    return max(_numbered(run_dir / "checkpoints"), default=(0, None))[1]


def to_resume(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from. `resume`: auto, the run's own latest, if there is one; never; or the path of a
    checkpoint or a run. Raises WeightsError where that path is neither."""
    if resume == "never":
        return None
    if resume == "auto":
        return latest(run_dir)
    path = Path(resume)
    found = path if (path / MANIFEST).is_file() or (path / META).is_file() else latest(path)
    if found is None:
        raise WeightsError(f"--resume {resume}: is no checkpoint, and no run's folder that has one")
    return found.resolve()


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
        raise WeightsError(f"{path / MANIFEST}: is damaged, or not this version's ({shortened(str(error))})") from None
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


def verify(path: Path, share: slice = slice(None)) -> Manifest:
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
            if size == wanted.bytes and record(file) == wanted:
                continue
        except FileNotFoundError:
            raise WeightsError(f"{file}: is missing, so the checkpoint is not whole") from None
        except OSError as error:
            raise WeightsError(f"{file}: can't be read ({error.strerror})") from None
        about = read_about(file)
        if about and (about.get("run"), about.get("step")) != (manifest.run, str(manifest.step)):
            what = "another run" if about.get("run") != manifest.run else f"step {about.get('step')}"
            raise WeightsError(f"{file}: is a part of {what}'s checkpoint")
        if size != wanted.bytes:
            raise WeightsError(f"{file}: has {size} bytes, and was written with {wanted.bytes}")
        raise WeightsError(f"{file}: is damaged: its bytes are not those that were written")
    return manifest


def offer(path: Path) -> str:
    """What can be done about a checkpoint that isn't whole."""
    for _, other in sorted(_numbered(path.resolve().parent), reverse=True):
        if other.name < path.resolve().name:
            try:
                verify(other)
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
        raise WeightsError(f"{path / META}: is damaged ({shortened(str(error))})") from None


def open_parts(path: Path) -> Parts:
    return Parts(path / name for name in read_manifest(path).files if name.endswith(".safetensors"))


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
    saved, now = _fixed_values(config_module.load(path / CONFIG)), _fixed_values(config)
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
        "augment.repeats": config.augment.repeats,
    }
    training = {
        "optim.name": config.optim.name,
        "optim.ema_decay > 0": config.optim.ema_decay > 0.0,
        "train.frozen": config.train.frozen,
    }
    return {**model, **training, **order}


@dataclass(frozen=True)
class Weights:
    """What a file or a checkpoint holds, and the config that it was trained with, where it is known."""

    found: Foreign
    config: Config | None
    class_names: list[str] | None
    source: Path

    @property
    def state(self) -> State:
        return self.found.state

    @property
    def grid(self) -> tuple[int, int] | None:
        """Of the patches that the weights were trained on."""
        return None if self.config is None else model_module.grid_of(self.config.model)

    def config_with(self, overrides: Iterable[str]) -> Config:
        """The config with ``section.key=value`` overrides. Raises ConfigError where none lies beside the weights."""
        if self.config is None:
            raise ConfigError(f"{self.source}: has no {CONFIG} beside it; name the run's config with -c")
        return config_module.load(
            self.source.parent / CONFIG if self.source.is_file() else self.source / CONFIG, overrides
        )


def load_weights(path: Path, *, averaged: bool = False) -> Weights:
    """Weights from a run's folder (its merged weights, or else its latest checkpoint), a checkpoint, or a file of any
    format that `formats.read` knows. `averaged`: of a run or checkpoint of ours the moving average.

    Raises WeightsError where there are none.
    """
    if path.is_file():
        beside = path.parent / CONFIG
        config = config_module.load(beside) if beside.is_file() else None
        found = formats.read(path)
        if config is not None:
            found = replace(found, facts=_facts(config))
        return Weights(found, config, _read_class_names(path.parent), path)
    merged = path / (MERGED_AVERAGE if averaged else MERGED)
    if merged.is_file():
        return load_weights(merged)
    if (path / MANIFEST).is_file() or (path / META).is_file():
        try:
            verify(path)
        except WeightsError as error:
            raise WeightsError(f"{error}; {offer(path)}") from None
        config = config_module.load(path / CONFIG)
        if averaged and config.optim.ema_decay == 0.0:
            raise WeightsError(f"{path}: has no moving average of the weights (optim.ema_decay is 0)")
        found = Foreign(merge(path, averaged=averaged), "this program's checkpoint", _facts(config))
        return Weights(found, config, _read_class_names(path), path)
    newest = latest(path)
    if newest is not None:
        return load_weights(newest, averaged=averaged)
    raise WeightsError(
        f"{path}: {'holds no weights' if path.is_dir() else 'no such file or folder'}; train first "
        "('./run.sh pretrain' makes output/quickstart), or name a run's folder, "
        "a checkpoint (checkpoints/step_*) or a file of weights (.pdparams, .npz, .safetensors)"
    )


def _facts(config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "num_heads": model_module.variant_of(model).num_heads,
        "class_position": model.class_position,
        **{key: getattr(model, key) for key in ("gelu", "layer_norm_epsilon", "pool", "norm_after_pool")},
    }


def write_class_names(folder_path: Path, class_names: Iterable[str]) -> None:
    """A line a class, in the order of the labels."""
    with write_atomically(folder_path / CLASS_NAMES) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")


def _read_class_names(folder_path: Path) -> list[str] | None:
    path = folder_path / CLASS_NAMES
    try:
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else None
    except UnicodeDecodeError:
        raise WeightsError(f"{path}: is not UTF-8 text; write it anew, a line a class, or take it away") from None


def merge(path: Path, *, averaged: bool = False) -> State:
    """A sharded checkpoint's weights, or their moving average, whole, in the files' layout."""
    parts = open_parts(path)
    # Of what is frozen there is no average: it is the same.
    wanted = {name: f"{name}@{EMA}" if averaged and f"{name}@{EMA}" in parts else name for name in parts}
    return fuse_qkv({name: parts.read(held) for name, held in wanted.items() if "@" not in name})

"""Checkpoints: saving all of a run's state in parts, going on from it, weights out of it, keeping the last few.

A checkpoint is a folder, ``checkpoints/step_00001234``, complete or absent: it is written under another name and
renamed. Every rank writes its own part. `latest` and `best` are links beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import paddle
import paddle.distributed as dist

import vit_static
from vit_static import config as config_module
from vit_static import formats
from vit_static import model as model_module
from vit_static.config import Config, ConfigError
from vit_static.files import point_to, sync
from vit_static.formats import Foreign, State, fuse_qkv
from vit_static.mesh import Mesh
from vit_static.optim import EMA
from vit_static.weight_files import WeightsError

FORMAT = 2
_META, _CONFIG, _CLASS_NAMES = "meta.json", "config.yaml", "class_names.txt"
MERGED, MERGED_AVERAGE = "model.pdparams", "model_ema.pdparams"


@dataclass(frozen=True)
class Progress:
    """Where a run stands; all else that it needs to go on follows from the step, the seed and the config."""

    step: int  # optimizer steps done
    evaluated_step: int = 0  # after how many of them the last evaluation was
    best_top1: float | None = None


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


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def save(
    state: Mapping[str, paddle.Tensor],
    progress: Progress,
    data: DataPosition,
    config: Config,
    mesh: Mesh,
    class_names: list[str],
    *,
    is_best: bool,
) -> Path:
    """Writes a checkpoint, moves `latest` (and `best`) to it, and removes those that are kept no longer.

    `state` is the compiled program's, by canonical names (step.Program.state). All ranks call it together.
    """
    final = folder(config.run_dir, progress.step)
    part = final.with_name(f".{final.name}.part")
    if mesh.rank == 0:
        shutil.rmtree(part, ignore_errors=True)  # a killed run's
        part.mkdir(parents=True)
    mesh.wait_for_all()
    dist.save_state_dict(dict(state), str(part))
    mesh.wait_for_all()
    if mesh.rank == 0:
        config_module.dump(config, part / _CONFIG)
        write_class_names(part, class_names)
        meta = {
            "format": FORMAT,
            "progress": asdict(progress),
            "data": asdict(data),
            "versions": {"vit_static": vit_static.__version__, "paddle": paddle.__version__},
        }
        (part / _META).write_text(json.dumps(meta, indent=1))
        for path in (*part.iterdir(), part):
            sync(path)
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        part.rename(final)
        sync(final.parent)
        point_to(final.parent / "latest", final.name)
        if is_best:
            point_to(final.parent / "best", final.name)
        _remove_old(final.parent, config.checkpoint.keep_last)
    mesh.wait_for_all()
    return final


def _remove_old(checkpoints: Path, keep_last: int) -> None:
    named = {(checkpoints / link).resolve().name for link in ("latest", "best") if (checkpoints / link).exists()}
    complete = sorted(path for path in checkpoints.glob("step_*") if path.is_dir())
    for path in complete[:-keep_last]:
        if path.name not in named:
            shutil.rmtree(path)


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, if it has one."""
    complete = sorted((run_dir / "checkpoints").glob("step_*/" + _META))
    return complete[-1].parent if complete else None


def set_aside(run_dir: Path) -> None:
    """Moves a run's checkpoints and merged weights out of the way of one that begins anew; nothing is deleted."""
    number = 1
    while (aside := run_dir / f"checkpoints_before_{number}").exists():
        number += 1
    if (run_dir / "checkpoints").exists():
        (run_dir / "checkpoints").rename(aside)
    for merged in (MERGED, MERGED_AVERAGE):
        if (run_dir / merged).exists():
            aside.mkdir(exist_ok=True)
            (run_dir / merged).rename(aside / merged)


def read_progress(path: Path) -> tuple[Progress, DataPosition]:
    """Raises WeightsError for what is not a checkpoint of this version's."""
    try:
        meta = json.loads((path / _META).read_text())
        if meta["format"] != FORMAT:
            raise WeightsError(f"{path}: is a checkpoint of format {meta['format']}, and this version reads {FORMAT}")
        return Progress(**meta["progress"]), DataPosition(**meta["data"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: is not a whole checkpoint ({error})") from None


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
    saved = _fixed_values(config_module.load(path / _CONFIG))
    for key, value in _fixed_values(config).items():
        if saved[key] != value:
            raise ConfigError(
                f"{key} = {value!r}: the run in {config.run_dir} was begun with {saved[key]!r}; "
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


def restore(state: dict[str, paddle.Tensor], path: Path, mesh: Mesh) -> None:
    """Fills the program's state from a checkpoint, whatever mesh wrote it."""
    # On one process Paddle fills no distributed tensors: it is given the parts they hold.
    view = state if mesh.world_size > 1 else {name: _local(tensor) for name, tensor in state.items()}
    dist.load_state_dict(view, str(path))


def _local(tensor: paddle.Tensor) -> paddle.Tensor:
    return tensor._local_value() if tensor.is_dist() else tensor


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
            raise ConfigError(f"{self.source}: has no {_CONFIG} beside it; name the run's config with -c")
        return config_module.load(
            self.source.parent / _CONFIG if self.source.is_file() else self.source / _CONFIG, overrides
        )


def load_weights(path: Path, *, averaged: bool = False) -> Weights:
    """Weights from a run's folder (its merged weights, or else its latest checkpoint), a checkpoint, or a file of any
    format that `formats.read` knows. `averaged`: of a run or checkpoint of ours the moving average.

    Raises WeightsError where there are none.
    """
    if path.is_file():
        beside = path.parent / _CONFIG
        config = config_module.load(beside) if beside.is_file() else None
        found = formats.read(path)
        if config is not None:
            found = replace(found, facts=_facts(config))
        return Weights(found, config, _read_class_names(path.parent), path)
    merged = path / (MERGED_AVERAGE if averaged else MERGED)
    if merged.is_file():
        return load_weights(merged)
    if (path / _META).is_file():
        read_progress(path)
        config = config_module.load(path / _CONFIG)
        if averaged and config.optim.ema_decay == 0.0:
            raise WeightsError(f"{path}: has no moving average of the weights (optim.ema_decay is 0)")
        found = Foreign(merge(path, config, averaged=averaged), "this program's checkpoint", _facts(config))
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
    (folder_path / _CLASS_NAMES).write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")


def _read_class_names(folder_path: Path) -> list[str] | None:
    path = folder_path / _CLASS_NAMES
    try:
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else None
    except UnicodeDecodeError:
        raise WeightsError(f"{path}: is not UTF-8 text; write it anew, a line a class, or take it away") from None


def merge(path: Path, config: Config, *, averaged: bool = False) -> State:
    """A sharded checkpoint's weights, or their moving average, whole, in the files' layout."""
    plain = model_module.build(config.model)
    suffix = f"@{EMA}" if averaged else ""
    state = {f"{name}{suffix}": value for name, value in plain.state_dict().items()}
    dist.load_state_dict(state, str(path))
    return fuse_qkv({name.removesuffix(suffix): value.numpy() for name, value in state.items()})

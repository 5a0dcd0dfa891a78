"""The teacher of distill.teacher: its weights, its config, and its model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_static.checkpoint.folder import CONFIG
from vit_static.checkpoint.progress import TeacherRecord
from vit_static.common.errors import ConfigError, UserError
from vit_static.config.loader import load_config
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import Config, InitConfig, ParallelConfig
from vit_static.model.attention import AttentionFunction
from vit_static.model.teacher import Normalization, Teacher
from vit_static.model.variants import variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import MeshShape, why_invalid
from vit_static.weights.infer import infer_config
from vit_static.weights.load import init_from
from vit_static.weights.source import Weights, load_weights


@dataclass(frozen=True)
class TeacherSource:
    """A teacher that was found: its model and its preprocessing, and its weights unless only its shape was needed."""

    path: str  # as the config names it
    model: ModelConfig  # without a head if only its features are used
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: Weights | None
    record: TeacherRecord | None  # identifies it in checkpoints, if its weights were read
    notes: tuple[str, ...] = ()

    def build(self, config: Config, attention: AttentionFunction) -> Teacher:
        """Return the model, with its weights if they were read, for a student of this config.

        Gives up the arrays that were read. Raises WeightsError if they don't fit the teacher's config.
        """
        network = VisionTransformer(self.model, attention)
        if self.weights is not None:
            returns_features = self.model.num_classes == 0
            init = InitConfig(head="reset" if returns_features else "keep")
            grid = self.weights.grid
            init_from(network, self.model, self.weights.external, str(self.weights.source), init, grid)
            self.weights.state.clear()
        return Teacher(
            network,
            Normalization(self.mean, self.std),
            Normalization(config.data.mean, config.data.std),
            [config.model.image_size, *(size for size, _ in config.train.image_sizes)],
            returns_features=config.distill.kind == "features",
        )


def find_teacher(config: Config, *, needs_weights: bool = True) -> TeacherSource | None:
    """Find and check the teacher of a run; None if it has none.

    Without `needs_weights` its shape is enough, and with distill.config the weights need not exist. Raises ConfigError
    if the teacher can't teach this student, WeightsError if there are no weights.
    """
    distill = config.distill
    if distill.teacher is None:
        return None
    given = None if distill.config is None else _load_config(distill.config)
    path = Path(distill.teacher)
    notes = []
    try:
        if given is None and not needs_weights:
            beside = (path if path.is_dir() else path.parent) / CONFIG
            given = load_config(beside) if beside.is_file() else None
        weights = None if given is not None and not needs_weights else load_weights(path)
        if given is None and weights is not None and weights.config is None:
            given = _inferred(weights)
            mean, std = given.data.mean, given.data.std
            notes.append(
                f"the teacher's file has no config beside it: its model is inferred from the arrays, and images are "
                f"normalized by data.mean {list(mean)} and data.std {list(std)}; distill.config names another config"
            )
    except ConfigError as error:
        raise ConfigError(f"distill.teacher: {error}") from None
    except UserError as error:
        raise type(error)(f"distill.teacher: {error}") from None
    teacher = given or (None if weights is None else weights.config)
    assert teacher is not None
    # No other answer, but the bits of the full computation if the student's config restores them.
    model = teacher.model.model_copy(update={"compute_unread_tokens": config.model.compute_unread_tokens})
    if distill.kind == "features":
        model = model.model_copy(update={"num_classes": 0, "representation_size": None})
    elif model.num_classes != config.model.num_classes:
        raise ConfigError(
            f"distill.kind = {distill.kind!r}: the teacher {distill.teacher} has {_classes(model)}, and this model "
            f"{_classes(config.model)}; use a teacher of the same classes, or set distill.kind=features"
        )
    mean, std = teacher.data.mean, teacher.data.std
    if weights is None or not needs_weights:
        return TeacherSource(distill.teacher, model, mean, std, None, None, tuple(notes))
    record = TeacherRecord(str(weights.source), _digest(weights, model, mean, std))
    return TeacherSource(distill.teacher, model, mean, std, weights, record, tuple(notes))


def _digest(weights: Weights, model: ModelConfig, mean: Sequence[float], std: Sequence[float]) -> str:
    """Return a digest of everything that decides what a teacher computes."""
    digest = hashlib.sha256()
    # Without defaults, so that a version with more keys gives the same digest.
    keys = model.model_dump(mode="json", exclude_defaults=True, exclude={"compute_unread_tokens"})
    described = {"model": keys, "mean": list(mean), "std": list(std)}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for name, array in sorted(weights.state.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def why_unsplittable(
    teacher: TeacherSource | None, parallel: ParallelConfig, shape: MeshShape, global_batch_size: int
) -> str | None:
    """Return why a teacher can't be split over a mesh that can train its student, and what to change."""
    if teacher is None:
        return None
    reason = why_invalid(parallel, shape, shape.world_size, global_batch_size, variant_of(teacher.model))
    return reason and f"distill.teacher = {teacher.path}: is split over the same mesh; for its model: {reason}"


def require_mesh(
    teacher: TeacherSource | None, parallel: ParallelConfig, shape: MeshShape, global_batch_size: int
) -> None:
    """Raise ConfigError if a teacher can't be split over a mesh that can train its student."""
    reason = why_unsplittable(teacher, parallel, shape, global_batch_size)
    if reason is not None:
        raise ConfigError(reason)


def _classes(model: ModelConfig) -> str:
    return f"{model.num_classes} classes" if model.num_classes != 1 else "1 class"


def _load_config(path: str) -> Config:
    try:
        config = load_config(path)
        variant_of(config.model)
    except ConfigError as error:
        raise ConfigError(f"distill.config: {error}") from None
    return config


def _inferred(weights: Weights, overrides: Iterable[str] = ()) -> Config:
    """Return the config that a file's arrays determine."""
    try:
        return infer_config(weights.external, str(weights.source), overrides)
    except UserError as error:
        message = str(error).partition("; set ")[0]
        raise ConfigError(f"{message}; set distill.config to a config of this teacher") from None

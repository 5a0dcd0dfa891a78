"""Features of a data set from a checkpoint or an exported model, extracted once and cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from vit_static.common.errors import AtLeast, DataError, UserError, newer_format, os_reason
from vit_static.common.io import cache_dir, write_atomically
from vit_static.common.terminal import ProgressBar
from vit_static.common.text import say
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.data.image_set import ImageDataset
from vit_static.data.open_set import count_classes, has_shards, open_set, split_path
from vit_static.export.exporter import read_batches
from vit_static.inference.artifact import ModelSpec, spec_of
from vit_static.inference.backends import has_gpu
from vit_static.inference.predictor import load_predictor
from vit_static.model.vit import VisionTransformer
from vit_static.probe.classifiers import Samples
from vit_static.weights.infer import config_for
from vit_static.weights.load import load_into
from vit_static.weights.source import WhichWeights, load_weights

_FORMAT = 1  # of the cache's files; a file without a number has it, too
_VERSION = 1  # of what extraction computes; part of the cache's key


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen model: its function from preprocessed images to features, and what identifies it."""

    spec: ModelSpec  # the preprocessing
    extract: Callable[[np.ndarray], np.ndarray]  # images [B, num_channels, height, width] to features [B, width]
    weights_digest: str
    description: str


def from_checkpoint(
    config: Config | None, checkpoint: Path, overrides: list[str], *, ema: bool, which: WhichWeights
) -> tuple[FeatureExtractor, Config]:
    """Return the model of a run, a checkpoint or a file of weights, and its config. Raises as the verb `eval` does."""
    loaded = load_weights(checkpoint, ema=ema, which=which, overrides=overrides)
    config = config_for(config, loaded, overrides)
    paddle.set_device("gpu" if has_gpu() and config.device != "cpu" else "cpu")
    model = VisionTransformer(config.model)
    load_into(model, config.model, loaded, config.init.pos_embed)
    model.eval()

    def extract(images: np.ndarray) -> np.ndarray:
        with paddle.no_grad():
            return model.features(paddle.to_tensor(images)).numpy()

    digest = hashlib.sha256(config.model.model_dump_json().encode())
    for name, array in sorted(loaded.state.items()):
        digest.update(f"{name} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    spec = spec_of(config, [str(label) for label in range(config.model.num_classes)])
    return FeatureExtractor(spec, extract, digest.hexdigest(), str(loaded.source)), config


def from_exported(folder: Path, config_path: Path | None, overrides: list[str]) -> tuple[FeatureExtractor, Config]:
    """Return the model that `export` wrote, and the config of the data, which the overrides or -c name.

    Raises PredictError if it can't be opened.
    """
    predictor = load_predictor(folder, backend="paddle")
    spec = predictor.spec
    config = load_config(config_path, [f"model.num_channels={spec.model.num_channels}", *overrides])

    def extract(images: np.ndarray) -> np.ndarray:
        features = predictor.run(images, with_features=True)[1]
        assert features is not None
        return features

    digest = hashlib.sha256(predictor.description.encode())
    digest.update(json.dumps({name: spec.files[name].sha256 for name in spec.program_files}).encode())
    return FeatureExtractor(spec, extract, digest.hexdigest(), f"{folder}, {predictor.description}"), config


def open_split(config: Config, split: str) -> ImageDataset:
    """Open a split with as many classes as it has. Raises DataError for several labels per image, and as open_set."""
    num_classes = config.model.num_classes
    if not has_shards(split_path(config.data, split)):
        num_classes = max(count_classes(config.data, each) for each in ("train", split))
    elif num_classes == 0:
        raise DataError(f"{config.data.root}: shards don't tell their number of classes; set model.num_classes")
    images = open_set(config.data, split, num_classes)
    if images.labels().offsets is not None:
        raise DataError(f"{split_path(config.data, split)}: an image has several labels, and a probe needs one")
    return images


def cached_features(extractor: FeatureExtractor, images: ImageDataset, *, refresh: bool) -> tuple[Samples, bool]:
    """Return the features of all images, and whether they come from the cache. With `refresh` they never do.

    The cache's key is the digest of the weights, the preprocessing, and the images' names, labels, sizes and times of
    modification. Raises DataError for an image that can't be read.
    """
    labels = images.labels().values.astype(np.int64)
    path = cache_dir() / "features" / f"{_cache_key(extractor, images)}.npz"
    newer = _newer_cache(path)
    if newer is not None:
        say(f"{path}: {newer}, so the features are extracted again, and it stays as it is")
        return Samples(extract_all(extractor, images), labels), False
    if not refresh:
        features = _read_cache(path, len(images))
        if features is not None:
            return Samples(features, labels), True
    features = extract_all(extractor, images)
    try:
        with write_atomically(path, AtLeast(features.nbytes)) as temporary, temporary.open("wb") as file:
            np.savez(file, features=features, format=np.array(_FORMAT))
    except OSError as error:
        say(f"{path}: the features can't be cached ({os_reason(error)}); they are extracted again next time")
    return Samples(features, labels), False


def extract_all(extractor: FeatureExtractor, images: ImageDataset) -> np.ndarray:
    """Return the features of all images, [num_images, width] float32, in their order.

    Raises UserError if they aren't finite.
    """
    batches = []
    with ProgressBar(len(images), "image", title="features") as progress_bar:
        for inputs, *_ in read_batches(images, np.arange(len(images)), extractor.spec):
            batches.append(extractor.extract(inputs))
            progress_bar.update(len(inputs))
    features = np.concatenate(batches)
    if not np.isfinite(features).all():
        raise UserError(f"{extractor.description}: its features have NaN or infinite values; use other weights")
    return features


def _newer_cache(path: Path) -> str | None:
    """Return what to say about a file of a newer format; None for any other, and if there is none."""
    try:
        with np.load(path, allow_pickle=False) as members:
            return newer_format(int(members["format"]), _FORMAT)
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _read_cache(path: Path, num_images: int) -> np.ndarray | None:
    """Return the features in a file of the cache; None if there are none, or if the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as members:
            features = members["features"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        say(f"{path}: is damaged, so the features are extracted again")
        return None
    return features if features.ndim == 2 and len(features) == num_images else None


def _cache_key(extractor: FeatureExtractor, images: ImageDataset) -> str:
    preprocessing = extractor.spec.preprocessing.model_dump_json()
    digest = hashlib.sha256(f"{_VERSION} {extractor.weights_digest} {preprocessing} {images.digest()}".encode())
    known: dict[str, bytes] = {}
    for index in range(len(images)):
        name = images.relative_name(index)
        container = os.path.dirname(name)  # noqa: PTH120 - of a shard's image, the shard
        if container.endswith(".tar"):
            name = container
        if name not in known:
            stat = os.stat(images.root / name)  # noqa: PTH116 - a Path per image is slow
            known[name] = f"{stat.st_size} {stat.st_mtime_ns} ".encode()
            digest.update(known[name])
    return digest.hexdigest()[:32]

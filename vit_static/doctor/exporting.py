"""Check of the export: a model of one block, compared with itself in Paddle Inference."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from vit_static.bench.photos import NUM_PHOTO_CLASSES, write_photos
from vit_static.config.data_schema import DataConfig
from vit_static.data.open_set import open_set
from vit_static.doctor.check import Result, failed, ok
from vit_static.doctor.subject import Subject, with_keys
from vit_static.export.exporter import compare, read_batches, without_tf32, write_artifact
from vit_static.inference.artifact import spec_of
from vit_static.inference.backends import check_machine
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import seed_everything

_NUM_PHOTOS = 4


def check_export(subject: Subject) -> Result:
    """The config's model with one block gives the same logits after its export in the config's precision.

    Runs in a process that hasn't trained: Paddle Inference opens no program in one that has.
    """
    config = with_keys(subject.config, model__depth=1, model__head_init_std=0.02, export__image_sizes=())
    check_machine(config.export.precision)
    seed_everything(config.seed)
    model = VisionTransformer(config.model)
    model.eval()
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as folder:
        write_photos(Path(root), _NUM_PHOTOS)
        images = open_set(DataConfig(root=root), "train", NUM_PHOTO_CLASSES)
        spec = spec_of(config, [str(index) for index in range(config.model.num_classes)])
        calibration = (inputs for inputs, *_ in read_batches(images, np.arange(_NUM_PHOTOS), spec))
        spec = write_artifact(model, config, spec, Path(folder), calibration)
        with without_tf32():
            comparisons = compare(model, spec, Path(folder), images, _NUM_PHOTOS)
    for name, comparison in comparisons.items():
        if not comparison.largest_difference <= comparison.bound:
            return failed(
                f"{name} ({spec.precision}): an output differs from the model's by "
                f"{comparison.largest_difference:.1e}; {comparison.bound:.1e} is allowed"
            )
    worst = max(comparison.largest_difference for comparison in comparisons.values())
    return ok(f"one block in {spec.precision}: outputs within {worst:.1e} of the model's", largest_difference=worst)

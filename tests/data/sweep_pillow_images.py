"""Compares how training, prediction and Pillow read all test pictures of Pillow's source distribution.

    curl -O https://files.pythonhosted.org/.../pillow-13.0.0.tar.gz     # the link is on pypi.org/project/pillow
    tar xzf pillow-13.0.0.tar.gz
    PYTHONPATH=.:tests python tests/data/sweep_pillow_images.py pillow-13.0.0/Tests/images

Every file goes through training's reader and DALI's decoder on the CPU, through `predict`'s reader, and Pillow's
functions. Each is read in a child process, which is replaced if a decoder ends it. The table has a line per format
and outcome; the exit code is 1 if a file is read differently (more than one grey level on average), by only one of
training and prediction, or ends a process.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from helpers.pillow_pixels import pillow_pixels

from vit_static.common.errors import DataError, PredictError
from vit_static.config.data_schema import DataConfig
from vit_static.data.dali_pipeline import decoding_pipeline
from vit_static.data.image_formats import PILLOW_FORMATS
from vit_static.data.image_pixels import decode_options, prepare_for_dali
from vit_static.data.image_set import has_too_many_pixels, read_file
from vit_static.inference.image_io import read_pixels

OPTIONS = decode_options(DataConfig())
MAX_MEAN_DIFFERENCE = 1.0  # grey levels
_FINE = ("same pixels", "unsupported", "damaged")


@dataclass(frozen=True)
class Outcome:
    """How a file was read; `difference` is the larger of training's and prediction's mean differences from Pillow."""

    path: Path
    kind: str  # Pillow's format and mode
    outcome: str
    difference: float = 0.0
    detail: str = ""


def pixels_of_training(path: Path) -> np.ndarray | str:
    """Return RGB pixels as DALI decodes them in training, or why training refuses the file."""
    try:
        encoded = read_file(os.fsencode(path))
        if has_too_many_pixels(encoded):
            return "too many pixels"
        (images,) = decoding_pipeline(1, 1, None).run(encoded=[prepare_for_dali(encoded, OPTIONS)])
        return np.array(images.as_tensor())[0]
    except (DataError, RuntimeError) as error:
        return str(error)


def pixels_of_prediction(path: Path) -> np.ndarray | str:
    """Return RGB pixels as `predict` decodes them, or why it refuses the file."""
    try:
        return read_pixels(path, OPTIONS)
    except PredictError as error:
        return str(error)


def compare(path: Path) -> Outcome:
    """Read a file in the three ways."""
    warnings.simplefilter("ignore")
    training, prediction = pixels_of_training(path), pixels_of_prediction(path)
    kind, pillow = pillow_pixels(path)
    if isinstance(training, str) and isinstance(prediction, str):
        is_unsupported = kind.split()[0] not in (*PILLOW_FORMATS, "MPO")
        outcome = "unsupported" if is_unsupported else "damaged" if isinstance(pillow, str) else "refused"
        return Outcome(path, kind, outcome, detail=training)
    if isinstance(training, str) or isinstance(prediction, str):
        detail = f"training: {training if isinstance(training, str) else 'reads it'}, " \
            f"prediction: {prediction if isinstance(prediction, str) else 'reads it'}"  # fmt: skip
        return Outcome(path, kind, "one refuses", detail=detail)
    if isinstance(pillow, str):
        return Outcome(path, kind, "only Pillow refuses", detail=pillow)
    if not training.shape == prediction.shape == pillow.shape:
        detail = f"training {training.shape}, prediction {prediction.shape}, Pillow {pillow.shape}"
        return Outcome(path, kind, "other size", detail=detail)
    difference = max(float(np.abs(pixels - pillow.astype(float)).mean()) for pixels in (training, prediction))
    return Outcome(path, kind, "same pixels" if difference <= MAX_MEAN_DIFFERENCE else "other pixels", difference)


def compare_all(paths: list[Path], num_processes: int) -> Iterator[Outcome]:
    """Compare the files in child processes. Those left when one ends are tried again in a single one, to name it."""
    remaining = list(paths)
    while remaining:
        failed: list[Path] = []
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as processes:
            futures = [(path, processes.submit(compare, path)) for path in remaining]
            for path, future in futures:
                try:
                    yield future.result()
                except BrokenProcessPool:
                    failed.append(path)
        if failed and num_processes == 1:
            yield Outcome(failed.pop(0), "?", "ends the process")  # the others had not been started
        remaining, num_processes = failed, 1


def main() -> int:
    """Print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare how training, prediction and Pillow read images.")
    parser.add_argument("folder", type=Path, help="a folder of images, with subfolders")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.folder.rglob("*") if path.is_file())
    groups: defaultdict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in compare_all(paths, arguments.processes):
        groups[outcome.kind.split()[0], outcome.outcome].append(outcome)
    print(f"{'format':<12}{'outcome':<22}{'files':>6}{'largest mean difference':>26}")
    for (kind, name), outcomes in sorted(groups.items()):
        print(f"{kind:<12}{name:<22}{len(outcomes):>6}{max(outcome.difference for outcome in outcomes):>26.3f}")
    wrong = [outcome for (_, name), outcomes in groups.items() if name not in _FINE for outcome in outcomes]
    for outcome in wrong:
        print(f"{outcome.path}: {outcome.kind}: {outcome.outcome} {outcome.difference:.2f} {outcome.detail}")
    print(f"{len(paths)} files, {len(wrong)} of them read differently")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""A small trained and exported model, and a process in which Paddle Inference can open exported models."""

from __future__ import annotations

import functools
import importlib
import io
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import vit_static
from helpers.runs import TINY
from vit_static.common.errors import ExportError, UserError
from vit_static.common.startup import prepare_process
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.export.exporter import export_checkpoint
from vit_static.inference.predict import predict_images
from vit_static.inference.predictor import Prediction, Predictor
from vit_static.train.trainer import train


class Exported(NamedTuple):
    """The exported model's folder, the folder of its run, and its data set."""

    folder: Path
    run: Path
    digits: Path

    def validation_images(self) -> list[Path]:
        return sorted((self.digits / "val").glob("*/*"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Exported:
    """Train a small model on digits for images of 16x32, and export it in float32."""
    base = tmp_path_factory.mktemp("exported")
    (base / "tiny.yaml").write_text(TINY)
    overrides = [f"data.root={small_digits}", f"output_dir={base}", "model.image_size=[16,32]", "optim.lr=3e-3"]
    config = load_config(base / "tiny.yaml", overrides)
    assert train(config)
    in_inference_process(export_checkpoint, None, config.run_dir / "model.pdparams", base / "model", [])
    return Exported(base / "model", config.run_dir, small_digits)


@functools.cache
def _inference_process() -> ProcessPoolExecutor:
    """Start a process that doesn't train: Paddle Inference can't open a program in one that has (backends.py)."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_process, (True,))


def in_inference_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in the inference process and return its result."""
    return _inference_process().submit(function, *arguments).result(timeout=120)


def runs_in_inference_process(test: Callable[..., None]) -> Callable[..., None]:
    """Decorate a test so that it runs, with the values of its fixtures, in the inference process."""

    @functools.wraps(test)
    def wrapper(**fixtures: Any) -> None:
        in_inference_process(_run_test, test.__module__, test.__name__, fixtures)

    return wrapper


def _run_test(module: str, name: str, fixtures: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(**fixtures)


@functools.cache
def open_predictor(folder: Path) -> Predictor:
    """Open an exported model in Paddle Inference by the documented entry point, once per process."""
    return vit_static.load(str(folder), backend="paddle")


def predict(folder: Path, paths: list[Path], top_k: int = 5) -> list[Prediction]:
    """Return the predictions of an exported model."""
    return open_predictor(folder)(paths, top_k)


def compute_features(folder: Path, paths: list[Path]) -> np.ndarray:
    """Return the features of an exported model by Paddle Inference."""
    return open_predictor(folder).features(paths)


def probabilities_shape(folder: Path) -> tuple[int, ...]:
    """Return the shape of the probabilities for one image, from a folder that may be damaged."""
    return Predictor(folder, num_threads=1).probabilities([np.full((9, 30, 3), 99, np.uint8)]).shape


def run_predict(folder: Path, images: list[Path]) -> tuple[int, str]:
    """Run the verb `predict`, and return the exit code and its output."""
    with redirect_stdout(io.StringIO()) as output:
        return predict_images(folder, images, top_k=5, batch_size=4), output.getvalue()


def run_export(
    source: Path, out: Path, overrides: list[str], config: Config | None = None, **options: bool
) -> tuple[str, str | None]:
    """Run the verb `export`, and return its output and its error, with the error's class, if there is one."""
    with redirect_stdout(io.StringIO()) as output:
        try:
            export_checkpoint(config, source, out, overrides, which="last", **options)
        except (UserError, ExportError) as error:
            return output.getvalue(), f"{type(error).__name__}: {error}"
    return output.getvalue(), None

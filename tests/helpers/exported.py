"""A small trained model, exported, for the tests of `predict` and `serve`."""

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

from helpers.runs import TINY
from vit_static.common.errors import ExportError, UserError
from vit_static.common.startup import prepare_process
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.export.exporter import export_checkpoint
from vit_static.inference.predict import predict_images
from vit_static.inference.predictor import Prediction, Predictor, load_predictor
from vit_static.train.trainer import train


class Exported(NamedTuple):
    """What `export` wrote, the run that it is of, and the images."""

    folder: Path
    run: Path
    digits: Path

    def validation(self) -> list[Path]:
        return sorted((self.digits / "val").glob("*/*"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Exported:
    base = tmp_path_factory.mktemp("exported")
    (base / "tiny.yaml").write_text(TINY)
    overrides = [f"data.root={small_digits}", f"output_dir={base}", "model.image_size=[16,32]", "optim.lr=3e-3"]
    config = load_config(base / "tiny.yaml", overrides)
    assert train(config)
    elsewhere(export_checkpoint, None, config.run_dir, base / "model", [])
    return Exported(base / "model", config.run_dir, small_digits)


@functools.cache
def _process() -> ProcessPoolExecutor:
    """One that trains nothing: Paddle Inference opens no program after that (cpu_kernels.has_operators)."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_process, (True,))


def elsewhere(do: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function of a module, in that process."""
    return _process().submit(do, *arguments).result(timeout=120)


def in_a_process_of_its_own(test: Callable[..., None]) -> Callable[..., None]:
    """A test, with the fixtures' values, in a process of these tests'."""

    @functools.wraps(test)
    def sent(**fixtures: Any) -> None:
        elsewhere(_run_test, test.__module__, test.__name__, fixtures)

    return sent


def _run_test(module: str, name: str, fixtures: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(**fixtures)


@functools.cache
def opened(folder: Path) -> Predictor:
    """In that process alone."""
    return load_predictor(str(folder))


def predictions(folder: Path, paths: list[Path], top_k: int = 5) -> list[Prediction]:
    return opened(folder)(paths, top_k)


def features(folder: Path, paths: list[Path]) -> np.ndarray:
    return opened(folder).features(paths)


def shape_of_answer(folder: Path) -> tuple[int, ...]:
    """Of a folder that may hold anything, as far as the probabilities of an image."""
    return Predictor(folder, num_threads=1).probabilities([np.full((9, 30, 3), 99, np.uint8)]).shape


def printed(folder: Path, images: list[Path]) -> tuple[int, str]:
    """The exit code and the output of the verb."""
    with redirect_stdout(io.StringIO()) as output:
        return predict_images(folder, images, top_k=5, batch_size=4), output.getvalue()


def written(
    source: Path, out: Path, overrides: list[str], config: Config | None = None, **options: bool
) -> tuple[str, str | None]:
    """What the verb prints, and the error that it ends with."""
    with redirect_stdout(io.StringIO()) as output:
        try:
            export_checkpoint(config, source, out, overrides, **options)
        except (UserError, ExportError) as error:
            return output.getvalue(), f"{type(error).__name__}: {error}"
    return output.getvalue(), None

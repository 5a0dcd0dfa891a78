"""Vision Transformers on PaddlePaddle: a static, auto-parallel program, fed by DALI."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vit_static.config.schema import InferencePrecision
    from vit_static.inference.predictor import Predictor

__version__ = "0.1.0"


def load(
    folder: str | os.PathLike[str], *, precision: InferencePrecision | None = None, num_threads: int | None = None
) -> Predictor:
    """Open an exported model for prediction; see `vit_static.inference.predictor.load_predictor`."""
    from vit_static.inference.predictor import load_predictor  # imports Paddle and DALI, which the package doesn't

    return load_predictor(folder, precision=precision, num_threads=num_threads)

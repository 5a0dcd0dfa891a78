"""Vision Transformers on PaddlePaddle: a static, auto-parallel program, fed by DALI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_static.inference.predictor import Predictor

__version__ = "0.1.0"


def load(path: str, **options: Any) -> Predictor:
    """Opens an exported model for prediction; see `vit_static.inference.predictor.load_predictor`."""
    from vit_static.inference.predictor import load_predictor  # Paddle and DALI load here, not with the package

    return load_predictor(path, **options)

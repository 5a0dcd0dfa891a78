"""The activation in ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import paddle
import pytest
from helpers.numpy_vit import logits as numpy_logits

from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import Config
from vit_static.export.exporter import write_artifact
from vit_static.inference.artifact import ONNX_FILE, spec_of
from vit_static.model.vit import VisionTransformer
from vit_static.weights.load import file_state

TINY = {"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 12, "patch_size": 4, "image_size": 8, "num_classes": 3}


@pytest.mark.needs_paddle2onnx
@pytest.mark.parametrize("gelu", ["erf", "tanh", "quick"])
def test_onnx_has_the_models_gelu(tmp_path: Path, gelu: str) -> None:
    """As NumPy defines it, in block and attention pooling; paddle2onnx 2.1.0 writes the exact one for tanh too."""
    config = ModelConfig.model_validate({**TINY, "pool": "map", "gelu": gelu})
    model = VisionTransformer(config)
    model.eval()
    paddle.seed(0)
    for name, parameter in model.named_parameters():  # so large that the three differ by much more than the tolerance
        is_scale = "norm" in name and name.endswith("weight")
        parameter.set_value(paddle.randn(parameter.shape) * 0.5 + float(is_scale))
    run = Config(name="gelu", model=config)
    write_artifact(model, run, spec_of(run, ["a", "b", "c"]), tmp_path, onnx=True)
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / ONNX_FILE), providers=["CPUExecutionProvider"])
    logits, _ = session.run(None, {"images": images})
    expected, *others = (
        numpy_logits(file_state(model), images, patch_size=4, num_heads=2, gelu=each)
        for each in (gelu, *({"erf", "tanh", "quick"} - {gelu}))
    )
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-6)
    assert all(np.abs(logits - other).max() > 1e-4 for other in others)

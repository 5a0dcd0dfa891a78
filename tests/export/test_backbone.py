"""A backbone without a head: exported, with its features, its attention maps, and no classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers.exported import Exported, compute_features, exported, in_inference_process, run_export  # noqa: F401
from helpers.forked_verbs import run_verb

from vit_static.__main__ import main
from vit_static.inference.artifact import read_spec
from vit_static.inference.attention_maps import load_checkpoint
from vit_static.inference.predictor import Preprocessor
from vit_static.weights.convert import convert_weights
from vit_static.weights.source import load_weights


@pytest.fixture(scope="module")
def backbone(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The trained model's weights without its head, as timm's program with num_classes=0 has them."""
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    options = {"to": None, "head": "drop", "image_size": None, "fold_layer_scale": False, "ema": False}
    convert_weights(None, exported.run, path, [], **options)
    assert not any(name.startswith("head") for name in load_weights(path).state)
    return path


@pytest.mark.needs_paddle2onnx
def test_a_backbone_is_exported_with_its_features(exported: Exported, backbone: Path, tmp_path: Path) -> None:  # noqa: F811
    """Without a config: its file says its model. Its features are those of the model with the head."""
    out, images = tmp_path / "model", exported.validation_images()[:5]
    overrides = [f"data.root={exported.digits}", "export.pixels=true"]
    output, error = in_inference_process(_export_with_onnx, backbone, out, overrides)
    assert error is None, error
    assert output.count("largest difference of a feature") == 3 and "top-1" not in output
    spec = read_spec(out)
    assert spec.class_names == [] and spec.model.num_classes == 0
    features = in_inference_process(compute_features, out, images)
    np.testing.assert_array_equal(features, in_inference_process(compute_features, exported.folder, images))

    done = run_verb("predict", "--model", out, *images, cwd=tmp_path)
    assert done.returncode == 2 and "--features OUT.npy" in done.stderr and done.stderr.count("\n") == 1
    request = ("--model", out, "--backend", "paddle", "--features", "x.npy", "--format", "table")
    done = run_verb("predict", *request, *images, cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 6, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), features)
    done = run_verb("visualize", "--model", out, "--out", "drawn", images[0], cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["top"] == [], done.stderr
    assert len(list((tmp_path / "drawn").glob("*_heads.png"))) == 1
    done = run_verb("serve", "--model", out, cwd=tmp_path)
    assert done.returncode == 2 and "serve answers with classes" in done.stderr


def test_a_backbones_attention_is_that_of_the_model(exported: Exported, backbone: Path) -> None:  # noqa: F811
    model, spec = load_checkpoint(None, backbone, [])
    whole, _ = load_checkpoint(None, exported.run, [])
    pixels = [np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)]
    inputs = paddle.to_tensor(Preprocessor(spec.preprocessing, 1)(pixels))
    with paddle.no_grad():
        np.testing.assert_array_equal(model(inputs).numpy(), whole.features(inputs).numpy())


def test_a_backbone_is_not_trained_or_evaluated(backbone: Path, capfd) -> None:
    training = [["pretrain", "-o", "model.num_classes=0"], ["plan", "-o", "model.num_classes=0"]]
    for arguments in (["eval", "--checkpoint", str(backbone)], *training):
        assert main(arguments) == 2
        assert "a model without a head" in capfd.readouterr().err


def _export_with_onnx(source: Path, out: Path, overrides: list[str]) -> tuple[str, str | None]:
    return run_export(source, out, overrides, onnx=True)

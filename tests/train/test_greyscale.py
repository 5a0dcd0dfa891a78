"""Greyscale images as one channel: pixels, training, export, prediction, pictures, and weights of RGB models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.exported import compute_features, in_inference_process, run_export
from helpers.forked_verbs import run_verb
from helpers.runs import TINY
from helpers.small import SMALL, model_logits, random_state
from helpers.weight_files import FILES, WEIGHTS
from PIL import Image

from vit_static.common.errors import ConfigError, WeightsError
from vit_static.config.data_schema import AugmentConfig, DataConfig, EvalConfig
from vit_static.config.loader import load_config
from vit_static.config.schema import Config, InitConfig
from vit_static.data.augment import num_draws_per_image, op_parameters
from vit_static.data.dali_pipeline import eval_pipeline, preprocessing_pipeline, train_pipeline
from vit_static.data.loader import EvalLoader
from vit_static.data.open_set import open_set
from vit_static.data.sampler import ShuffledSampler
from vit_static.export.preprocess_layer import FromPixels
from vit_static.inference.artifact import read_spec, spec_of
from vit_static.model.flops import forward_macs
from vit_static.model.variants import shape_of
from vit_static.model.vit import VisionTransformer
from vit_static.train.trainer import train
from vit_static.weights.convert import convert_state, write_converted
from vit_static.weights.formats import ExternalWeights, read_weights
from vit_static.weights.infer import infer_config
from vit_static.weights.load import init_from
from vit_static.weights.source import load_weights

GREY = DataConfig(mean=0.4, std=0.25, num_threads=1)
KEEP = InitConfig(head="keep")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A colour photo, and one that is stored in grey, both smooth so that resampling them is well defined."""
    folder = tmp_path_factory.mktemp("photos")
    y, x = np.mgrid[0:60, 0:80] / 60.0
    waves = [np.sin(5 * x + channel) * np.cos(4 * y - channel) for channel in range(3)]
    colour = Image.fromarray((127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8))
    colour.save(folder / "colour.png")
    colour.convert("L").save(folder / "grey.png")
    return [folder / "colour.png", folder / "grey.png"]


def test_all_pipelines_have_pils_grey(photos: list[Path]) -> None:
    """Evaluation, prediction and the exported preprocessing, to one grey level; training with every augmentation."""
    encoded = [np.frombuffer(path.read_bytes(), np.uint8) for path in photos]
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in photos]
    zeros, ones, evaluation = np.zeros(2, np.int64), np.ones(2, np.float32), EvalConfig(resize="direct")
    pipeline = eval_pipeline(lambda n: (encoded, zeros, ones), 2, (24, 32), GREY, evaluation, None)
    ours = pipeline.run()[0].as_array()
    assert ours.shape == (2, 1, 24, 32)
    resized = [Image.fromarray(image).resize((32, 24), Image.Resampling.BICUBIC) for image in pixels]
    expected = np.stack([np.asarray(image.convert("L"), np.float64)[None] / 255 for image in resized])
    assert np.abs(ours * 0.25 + 0.4 - expected).max() <= 1.5 / 255
    (predicted,) = preprocessing_pipeline(2, 1, (24, 32), GREY, evaluation).run(pixels=pixels)
    np.testing.assert_array_equal(predicted.as_array(), ours)

    config = Config.model_validate(
        {
            "name": "x",
            "model": {"image_size": 32, "num_channels": 1, "num_classes": 3},
            "data": {"mean": 0.4, "std": 0.25},
        }
    )
    preprocessing = spec_of(config, ["a", "b", "c"]).preprocessing.model_copy(
        update={"image_size": (24, 32), "resize": "direct"}
    )
    from_pixels = FromPixels(paddle.nn.Identity(), preprocessing, "softmax")
    for image, row in zip(pixels, ours, strict=True):
        exported = from_pixels.preprocess(paddle.to_tensor(image[None])).numpy()[0]
        assert exported.shape == (1, 24, 32) and np.abs(exported - row).max() * 0.25 <= 1.1 / 255

    augment = AugmentConfig(policy="randaugment", color_jitter=0.4, random_erasing_probability=1.0)
    draws = ShuffledSampler(2, seed=1).augmentation_draws(0, 2, num_draws_per_image(augment))
    values = tuple(op_parameters(draws, augment, (24, 32)).values())
    crops = ShuffledSampler(2, seed=1).crop_flip_draws(0, 2)
    pipeline = train_pipeline(lambda n: (encoded, zeros, crops, *values), 2, (24, 32), GREY, augment, None)
    images = pipeline.run()[0].as_array()
    assert images.shape == (2, 1, 24, 32) and np.isfinite(images).all() and images.std() > 0.1


def test_mean_and_std_have_one_value_per_channel(tmp_path: Path) -> None:
    config = load_config(None, ["model.num_channels=1"])
    assert config.data.mean == config.data.std == (0.5,)
    assert load_config(None, ["model.num_channels=1", "data.mean=0.3", "data.std=[0.2]"]).data.mean == (0.3,)
    assert load_config(None).data.mean == (0.5, 0.5, 0.5)
    for overrides, message in (
        (["model.num_channels=1", "data.mean=[0.5,0.5,0.5]"], r"data\.mean: has 3 values.*set one value"),
        (["data.std=[0.5]"], r"data\.std=\[0\.5\]: has 1 value, and model\.num_channels is 3; set three values"),
        (["data.mean=[0.5,0.5]"], r"data\.mean.*three values for RGB, or one"),
        (["model.num_channels=2"], r"model\.num_channels"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(None, overrides)


def one_channel(external: ExternalWeights, config: Any) -> tuple[VisionTransformer, Any]:
    grey = config.model_copy(update={"num_channels": 1})
    model = VisionTransformer(grey)
    grid = (config.image_size[0] // 4, config.image_size[1] // 4)
    return model, init_from(model, grey, external, "x", KEEP, grid)


def test_rgb_weights_give_the_same_logits_on_grey_images() -> None:
    """Their filters' channels are added up, as in timm: all three channels of a grey image are equal."""
    external = ExternalWeights(random_state(), "test")
    rgb = VisionTransformer(SMALL)
    init_from(rgb, SMALL, external, "x", KEEP, (3, 4))
    grey, report = one_channel(external, SMALL)
    assert "R, G and B of patch_embed.proj.weight" in report.folded and "patch_embed.proj.weight" in report.used
    images = np.random.default_rng(0).standard_normal((3, 1, *SMALL.image_size)).astype(np.float32)
    expected = model_logits(rgb, paddle.to_tensor(np.repeat(images, 3, axis=1)))
    np.testing.assert_allclose(model_logits(grey, paddle.to_tensor(images)), expected, rtol=0, atol=1e-5)
    with pytest.raises(WeightsError, match=r"-o model\.num_channels=1"):
        init_from(rgb, SMALL, ExternalWeights(random_state(num_channels=1), "test"), "x", KEEP, (3, 4))
    macs = [forward_macs(shape_of(SMALL.model_copy(update={"num_channels": n}))) for n in (1, 3)]
    assert macs[1] - macs[0] == 12 * 2 * 4**2 * SMALL.width  # 12 patches of 4 x 4 pixels, two channels less


@pytest.mark.parametrize("name", ["timm_deit3", "hf_dinov2", "vit_jax"])
def test_grey_weights_are_converted_to_the_same_bits(tmp_path: Path, name: str) -> None:
    external = read_weights(WEIGHTS / FILES[name])
    size = (12, 20) if name == "vit_jax" else None
    config = infer_config(external, name, ["model.num_heads=4"], size).model
    grid = (config.image_size[0] // 4, config.image_size[1] // 4)
    grey = config.model_copy(update={"num_channels": 1})
    state, _ = convert_state(external, grey, name, KEEP, grid)
    target = tmp_path / Path(FILES[name]).name
    to = {"timm": "timm", "hf": "huggingface", "vit": "google"}[name.split("_")[0]]
    write_converted(state, grey, target, to)
    again = read_weights(target)
    assert again.model is not None and again.model.num_channels == 1
    assert all(again.state[key].tobytes() == state[key].tobytes() for key in state)
    if to == "huggingface":
        assert json.loads((tmp_path / "config.json").read_text())["num_channels"] == 1


@pytest.mark.needs_paddle2onnx
def test_a_greyscale_run_from_training_to_prediction(tmp_path: Path, small_digits: Path, finished: Config) -> None:
    """Finetuned from an RGB run, whose shape it takes; the verbs agree with each other."""
    (tmp_path / "grey.yaml").write_text(
        TINY.replace(TINY.splitlines()[0], "model: {from: init, num_channels: 1, num_classes: 10}")
    )
    overrides = [
        f"data.root={small_digits}",
        f"output_dir={tmp_path}",
        f"init.from={finished.run_dir}",
        "optim.lr=3e-3",
    ]
    config = load_config(tmp_path / "grey.yaml", [*overrides, "train.max_steps=4"])
    assert train(config)
    resolved = load_config(config.run_dir / "config.yaml").model
    assert (resolved.width, resolved.depth, resolved.num_channels) == (32, 1, 1)
    assert "R, G and B" in (config.run_dir / "init.json").read_text()
    # A resume takes the shape from the checkpoint: the RGB run may be gone.
    gone = [override for override in overrides if "init.from" not in override] + ["init.from=gone", "train.max_steps=6"]
    assert train(load_config(tmp_path / "grey.yaml", gone))

    export = ["export.pixels=true"]
    output, error = in_inference_process(_export_with_onnx, config.run_dir, tmp_path / "model", export)
    assert error is None and output.count("largest difference") == 3, error
    spec = read_spec(tmp_path / "model")
    assert spec.model.num_channels == 1 and spec.preprocessing.mean == (0.5,)
    assert "[B, 1, 16, 16] float32, any B: grey" in (tmp_path / "model" / "MODEL_CARD.md").read_text()
    images = sorted((small_digits / "val").glob("*/*"))[:4]
    features = in_inference_process(compute_features, tmp_path / "model", images)
    loader = EvalLoader(
        open_set(config.data, "val", 10), (16, 16), 4, config.data, config.eval, dp_rank=0, dp_size=1, device_id=None
    )
    model = VisionTransformer(resolved)
    init_from(model, resolved, load_weights(config.run_dir).external, "x", KEEP)
    model.eval()
    with paddle.no_grad():
        expected = model.features(next(iter(loader))[0]).numpy()
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)
    done = run_verb("visualize", "--checkpoint", config.run_dir, "--out", "drawn", images[0], cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "drawn" / "patch_filters.png").exists(), done.stderr
    done = run_verb("plan", "-c", config.run_dir / "config.yaml", "--mesh", "dp=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def _export_with_onnx(source: Path, out: Path, overrides: list[str]) -> tuple[str, str | None]:
    return run_export(source, out, overrides, onnx=True)

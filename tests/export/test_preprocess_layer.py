"""Preprocessing inside the exported program, against DALI and Pillow."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers.exported import Exported, in_inference_process, run_export
from helpers.sets import UPRIGHT_ON_WHITE, photo
from PIL import Image

from vit_static.export.preprocess_layer import FromPixels
from vit_static.inference.artifact import MODEL_FILE, PIXELS_FILE, WEIGHTS_FILE, Preprocessing, read_spec
from vit_static.inference.backends import PaddleSession
from vit_static.inference.image_io import read_pixels
from vit_static.inference.predictor import Predictor, Preprocessor

# (height, width): photographs, images smaller than the crop, of one pixel, and far longer than wide
SIZES = [(100, 130), (375, 500), (55, 73), (30, 20), (64, 64), (1, 50), (50, 1), (300, 2000), (5000, 3)]


def make_preprocessing(**changed: object) -> Preprocessing:
    """Return a preprocessing to 48x64 pixels whose normalisation keeps grey levels as they are."""
    values = {"image_size": (48, 64), "resize": "short", "crop_pct": 0.875, "interpolation": "bicubic"}
    values |= {"antialias": True, "mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
    return Preprocessing.model_validate(values | changed)


def preprocess_in_program(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    layer = FromPixels(paddle.nn.Identity(), preprocessing, "softmax")
    return layer.preprocess(paddle.to_tensor(pixels)).numpy()


@pytest.mark.parametrize(
    ("resize", "interpolation", "antialias"),
    list(itertools.product(["short", "direct"], ["bicubic", "bilinear"], [True, False])),
)
def test_it_agrees_with_dali_to_one_grey_level(resize: str, interpolation: str, antialias: bool) -> None:
    preprocessing = make_preprocessing(resize=resize, interpolation=interpolation, antialias=antialias)
    dali = Preprocessor(preprocessing, 1)
    for seed, (height, width) in enumerate(SIZES):
        pixels = np.ascontiguousarray(np.asarray(photo(max(height, 9), max(width, 9), seed=seed))[:height, :width])
        result, expected = preprocess_in_program(pixels[None], preprocessing)[0], dali([pixels])[0]
        assert result.shape == (3, 48, 64)
        difference = np.abs(result - expected)
        assert difference.max() <= 1.001 and difference.mean() <= 0.12, (height, width)


def test_it_agrees_with_pillow_to_its_rounding() -> None:
    """Pillow rounds after each of its two passes."""
    for seed, (height, width) in enumerate([(375, 500), (100, 130), (31, 20)]):
        image = photo(height, width, seed=seed)
        expected = np.asarray(image.resize((64, 48), Image.Resampling.BICUBIC))
        result = preprocess_in_program(np.asarray(image)[None], make_preprocessing(resize="direct"))[0]
        difference = np.abs(result.transpose(1, 2, 0) - expected)
        assert difference.mean() < 0.5 and difference.max() <= 2.001


def test_each_channel_is_normalised_with_its_mean_and_deviation() -> None:
    pixels = np.asarray(photo(60, 80, seed=1))[None]
    levels = preprocess_in_program(pixels, make_preprocessing())
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    result = preprocess_in_program(pixels, make_preprocessing(mean=mean, std=std))
    expected = (levels / 255 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    np.testing.assert_allclose(result, expected, atol=1e-5)


def predict_both_ways(folder: Path, paths: list[Path]) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Return probabilities by the program with preprocessing and by the one without, and the shape of its features.

    The program with preprocessing must give the same for an image alone and for a batch of three copies.
    """
    precision = read_spec(folder).precision
    program = PaddleSession(folder / PIXELS_FILE, folder / WEIGHTS_FILE, 2, precision=precision)
    rows, features = [], None
    for path in paths:
        pixels = read_pixels(path, UPRIGHT_ON_WHITE)
        (row,) = program.outputs(pixels[None])[0].copy_to_cpu()
        batch_rows, features = program.outputs(np.stack([pixels] * 3))
        np.testing.assert_allclose(batch_rows.copy_to_cpu(), [row] * 3, atol=2e-3 if precision == "bfloat16" else 1e-5)
        rows.append(row)
    assert features is not None
    return np.stack(rows), Predictor(folder).probabilities(paths), tuple(features.copy_to_cpu().shape)


@pytest.mark.parametrize(
    "precision",
    ["float32", pytest.param("bfloat16", marks=pytest.mark.needs_bfloat16)],
)
def test_programs_with_and_without_preprocessing_agree(exported: Exported, tmp_path: Path, precision: str) -> None:
    output, error = in_inference_process(
        run_export, exported.run, tmp_path / "model", ["export.pixels=true", f"export.precision={precision}"]
    )
    assert error is None, error
    assert f"pixels.json ({precision}): largest difference of a probability from the trained model's" in output
    spec = read_spec(tmp_path / "model")
    assert set(spec.comparisons) == {MODEL_FILE, PIXELS_FILE} and PIXELS_FILE in spec.files
    assert not (tmp_path / "model" / "pixels.pdiparams").exists()
    assert "`pixels` [B, height, width, 3] uint8" in (tmp_path / "model/MODEL_CARD.md").read_text()
    paths = exported.validation_images()[:3]
    for seed, (height, width) in enumerate([(40, 90), (200, 31), (12, 12)]):
        photo(height, width, seed=seed).save(tmp_path / f"{seed}.png")
        paths.append(tmp_path / f"{seed}.png")
    probabilities, expected, features_shape = in_inference_process(predict_both_ways, tmp_path / "model", paths)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(probabilities, expected, atol=0.01)
    assert features_shape == (3, 32)

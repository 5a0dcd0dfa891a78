"""The preprocessing inside the exported program, against DALI's and Pillow's."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import paddle
import pytest
from exported import Exported, elsewhere
from PIL import Image
from sets import photo
from test_export import written

from vit_static.model_folder import MODEL_FILE, PIXELS_FILE, WEIGHTS_FILE, Preprocessing, read_card
from vit_static.pixels import FromPixels
from vit_static.predict import Predictor, Preprocessor, read_pixels
from vit_static.sessions import PaddleSession

# Height, width: of photographs, smaller than the crop, of one pixel, far longer than wide
SIZES = [(100, 130), (375, 500), (55, 73), (30, 20), (64, 64), (1, 50), (50, 1), (300, 2000), (5000, 3)]


def asked(**changed: object) -> Preprocessing:
    """Normalisation leaves grey levels as they are."""
    plain = {"image_size": (48, 64), "resize": "short", "crop_ratio": 0.875, "interpolation": "bicubic"}
    plain |= {"antialias": True, "mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
    return Preprocessing.model_validate(plain | changed)


def in_program(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    layer = FromPixels(paddle.nn.Identity(), preprocessing, "softmax")
    return layer.preprocessed(paddle.to_tensor(pixels)).numpy()


@pytest.mark.parametrize(
    ("resize", "interpolation", "antialias"),
    list(itertools.product(["short", "direct"], ["bicubic", "bilinear"], [True, False])),
)
def test_it_is_dalis_to_a_grey_level(resize: str, interpolation: str, antialias: bool) -> None:
    preprocessing = asked(resize=resize, interpolation=interpolation, antialias=antialias)
    dali = Preprocessor(preprocessing, 1)
    for seed, (height, width) in enumerate(SIZES):
        pixels = np.ascontiguousarray(np.asarray(photo(max(height, 9), max(width, 9), seed=seed))[:height, :width])
        ours, theirs = in_program(pixels[None], preprocessing)[0], dali([pixels])[0]
        assert ours.shape == (3, 48, 64)
        assert np.abs(ours - theirs).max() <= 1.001 and np.abs(ours - theirs).mean() <= 0.12, (height, width)


def test_it_is_pillows_to_its_rounding() -> None:
    """Pillow rounds after each of its two passes."""
    for seed, (height, width) in enumerate([(375, 500), (100, 130), (31, 20)]):
        picture = photo(height, width, seed=seed)
        theirs = picture.resize((64, 48), Image.Resampling.BICUBIC)
        ours = in_program(np.asarray(picture)[None], asked(resize="direct"))[0].transpose(1, 2, 0)
        assert np.abs(ours - np.asarray(theirs)).mean() < 0.5 and np.abs(ours - np.asarray(theirs)).max() <= 2.001


def test_means_and_deviations_are_each_channels() -> None:
    pixels = np.asarray(photo(60, 80, seed=1))[None]
    plain = in_program(pixels, asked())
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    changed = in_program(pixels, asked(mean=mean, std=std))
    expected = (plain / 255 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    np.testing.assert_allclose(changed, expected, atol=1e-5)


def shares_of(folder: Path, paths: list[Path]) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Of the program with the preprocessing, one image at a time and three copies at once, and of the one without."""
    precision = read_card(folder).precision
    program = PaddleSession(folder / PIXELS_FILE, folder / WEIGHTS_FILE, 2, precision=precision)
    found, features = [], None
    for path in paths:
        pixels = read_pixels(path)
        (one,) = program.outputs(pixels[None])[0].copy_to_cpu()
        shares, features = program.outputs(np.stack([pixels] * 3))
        np.testing.assert_allclose(shares.copy_to_cpu(), [one] * 3, atol=2e-3 if precision == "bfloat16" else 1e-5)
        found.append(one)
    assert features is not None
    return np.stack(found), Predictor(folder).probabilities(paths), tuple(features.copy_to_cpu().shape)


@pytest.mark.parametrize(
    "precision",
    ["float32", pytest.param("bfloat16", marks=pytest.mark.needs_bfloat16)],
)
def test_the_exported_program_answers_as_the_one_without_it(exported: Exported, tmp_path: Path, precision: str) -> None:
    said, error = elsewhere(
        written, exported.run, tmp_path / "model", ["export.pixels=true", f"export.precision={precision}"]
    )
    assert error is None, error
    assert f"pixels.json ({precision}): largest difference of a probability from the trained model's" in said
    card = read_card(tmp_path / "model")
    assert set(card.comparisons) == {MODEL_FILE, PIXELS_FILE} and PIXELS_FILE in card.files
    assert not (tmp_path / "model" / "pixels.pdiparams").exists()
    assert "`pixels` [B, height, width, 3] uint8" in (tmp_path / "model/MODEL_CARD.md").read_text()
    paths = exported.validation()[:3]
    for number, (height, width) in enumerate([(40, 90), (200, 31), (12, 12)]):
        photo(height, width, seed=number).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    found, expected, shape = elsewhere(shares_of, tmp_path / "model", paths)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert shape == (3, 32)

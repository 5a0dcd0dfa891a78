"""The pipelines' pixels against PIL's, the random crop against torchvision's, and errors about files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sets import photo, thirteen_images
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from scipy import stats

from vit_static.common.errors import DataError
from vit_static.config.data_schema import AugmentConfig, DataConfig, EvalConfig
from vit_static.data.dali_pipeline import eval_pipeline, preprocessing_pipeline, random_crop, train_pipeline
from vit_static.data.digits import make_digits
from vit_static.data.image_set import ImageDataset
from vit_static.data.loader import EvalLoader, TrainLoader
from vit_static.data.open_set import open_set
from vit_static.data.sampler import NUM_CROP_FLIP_DRAWS, ShuffledSampler

# ImageNet's mean and std, which differ per channel, so that a confusion of channels would show
DATA = DataConfig(num_threads=1, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# For pixels in 0-1. DALI and PIL differ by rounding: both return 8 bits after a resize, but PIL rounds after each of
# its two passes, and DALI once. So a fifth of the values differ by a grey level (measured: means of 0.10 to 0.25
# levels, and at most 2; DALI is within 0.02 of PIL's float resize, rounded once). The decoders agree to the last bit.
# A crop that is off by one pixel differs by 4 to 7 levels in these images.
BOUND = 0.5 / 255

SIZES = [(375, 500), (500, 375), (400, 300), (257, 301), (80, 91), (64, 64)]  # height, width


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six generated photos and twenty of scikit-learn's digits, as JPEG files."""
    root = tmp_path_factory.mktemp("photos")
    for index, size in enumerate(SIZES):
        photo(*size, seed=index).save(root / f"{index}.jpeg", quality=90)
    make_digits(root / "digits")
    return sorted(root.glob("*.jpeg")) + sorted(root.glob("digits/val/*/*.jpeg"))[:340:17]


def read_files(paths: Sequence[Path]) -> list[np.ndarray]:
    return [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]


def eval_pixels(paths: Sequence[Path], image_size: tuple[int, int], evaluation: EvalConfig) -> np.ndarray:
    """Return the evaluation pipeline's images, [num_images, 3, height, width]."""
    zeros, ones = np.zeros(len(paths), np.int64), np.ones(len(paths), np.float32)
    pipeline = eval_pipeline(
        lambda n: (read_files(paths), zeros, ones), len(paths), image_size, DATA, evaluation, device_id=None
    )
    return pipeline.run()[0].as_array()


def train_pixels(
    paths: Sequence[Path], draws: np.ndarray, image_size: tuple[int, int], augment: AugmentConfig
) -> np.ndarray:
    """Return the training pipeline's images for the draws [num_images, NUM_CROP_FLIP_DRAWS]."""
    zeros = np.zeros(len(paths), np.int64)
    pipeline = train_pipeline(
        lambda n: (read_files(paths), zeros, draws), len(paths), image_size, DATA, augment, device_id=None
    )
    return pipeline.run()[0].as_array()


def normalise(image: Image.Image) -> np.ndarray:
    return ((np.asarray(image, np.float64) / 255 - DATA.mean) / DATA.std).transpose(2, 0, 1)


def eval_pixels_of_pil(path: Path, image_size: tuple[int, int], evaluation: EvalConfig) -> np.ndarray:
    """As in PLSC: the short side is resized, the long side rounded, the corner of the centre crop rounded down."""
    image = Image.open(path).convert("RGB")
    height, width = image_size
    pil_filter = PIL_FILTERS[evaluation.interpolation]
    if evaluation.resize == "direct":
        return normalise(image.resize((width, height), pil_filter))
    scale = max(round(height / evaluation.crop_pct) / image.height, round(width / evaluation.crop_pct) / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), pil_filter)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return normalise(image.crop((left, top, left + width, top + height)))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the worst channel's mean absolute difference of two normalised images, for pixels in 0-1."""
    assert ours.shape == theirs.shape
    return float((np.abs(ours - theirs).mean(axis=(1, 2)) * DATA.std).max())


@pytest.mark.parametrize("image_size", [(224, 224), (96, 160)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["short", "direct"])
def test_evaluation_pixels_are_pils(
    photos: list[Path], image_size: tuple[int, int], interpolation: str, resize: str
) -> None:
    evaluation = EvalConfig(resize=resize, interpolation=interpolation)
    ours = eval_pixels(photos, image_size, evaluation)
    differences = {
        f"{path.name} {Image.open(path).size}": difference(image, eval_pixels_of_pil(path, image_size, evaluation))
        for path, image in zip(photos, ours, strict=True)
    }
    worst = max(differences, key=differences.__getitem__)
    print(f"worst of {len(photos)}: {255 * differences[worst]:.3f} grey levels, {worst}")
    too_different = {name: round(255 * value, 2) for name, value in differences.items() if value > BOUND}
    assert not too_different, "mean difference in grey levels"


@pytest.mark.parametrize("antialias", [True, False])
def test_antialiasing_can_be_turned_off(photos: list[Path], antialias: bool) -> None:
    evaluation = EvalConfig(resize="direct", antialias=antialias)
    (ours,) = eval_pixels(photos[:1], (64, 64), evaluation)
    assert (difference(ours, eval_pixels_of_pil(photos[0], (64, 64), evaluation)) < BOUND) == antialias


def test_decoded_images_are_preprocessed_like_files(photos: list[Path]) -> None:
    """Prediction and evaluation agree to the last bit."""
    evaluation = EvalConfig()
    pipeline = preprocessing_pipeline(len(photos), 1, (64, 96), DATA, evaluation)
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in photos]
    (from_pixels,) = pipeline.run(pixels=pixels)
    np.testing.assert_array_equal(from_pixels.as_array(), eval_pixels(photos, (64, 96), evaluation))


def torchvision_crop(height: int, width: int, draws: np.ndarray, augment: AugmentConfig) -> tuple[int, ...]:
    """Return (top, left, height, width) of torchvision's RandomResizedCrop.get_params with these uniform numbers."""
    min_area, max_area = augment.crop_scale
    log_min, log_max = (math.log(aspect) for aspect in augment.crop_aspect_ratio)
    for area_draw, aspect_draw in zip(draws[:10].astype(float), draws[10:20].astype(float), strict=True):
        area = height * width * (min_area + (max_area - min_area) * area_draw)
        aspect = math.exp(log_min + (log_max - log_min) * aspect_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int((height - h + 1) * float(draws[20])), int((width - w + 1) * float(draws[21])), h, w
    min_aspect, max_aspect = augment.crop_aspect_ratio
    w, h = width, height
    if width / height < min_aspect:
        h = round(w / min_aspect)
    elif width / height > max_aspect:
        w = round(h * max_aspect)
    return (height - h) // 2, (width - w) // 2, h, w


def random_crops(shapes: np.ndarray, draws: np.ndarray, augment: AugmentConfig) -> np.ndarray:
    """Return the crops of `random_crop` in a pipeline, [num_shapes, 4]."""

    @pipeline_def(batch_size=len(shapes), num_threads=1, device_id=None)
    def pipeline() -> tuple[Any, Any]:
        shape = fn.external_source(source=lambda n: shapes, batch=True, dtype=types.INT64, ndim=1)
        numbers = fn.external_source(source=lambda n: draws, batch=True, dtype=types.FLOAT, ndim=1)
        return random_crop(shape, numbers, augment)

    built = pipeline()
    built.build()
    return np.concatenate([part.as_array() for part in built.run()], axis=1)


EXTREME_SHAPES = [(1, 1), (1, 2), (2, 1), (10, 1000), (1000, 10), (1, 1000), (1000, 3), (3, 5000), (5000, 4000)]


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(),
        AugmentConfig(crop_scale=(0.05, 1.0)),  # PLSC's
        AugmentConfig(crop_scale=(0.9, 1.0), crop_aspect_ratio=(9 / 10, 10 / 9)),  # often none of the ten attempts fits
        AugmentConfig(crop_scale=(1.0, 1.0), crop_aspect_ratio=(1.0, 1.0)),  # none fits, except in a square
    ],
    ids=["default", "plsc", "narrow", "square"],
)
def test_the_random_crop_is_torchvisions(augment: AugmentConfig) -> None:
    rng = np.random.default_rng(1)
    tiny, usual = rng.integers(1, 4, (100, 2)), rng.integers(1, 700, (400 - len(EXTREME_SHAPES), 2))
    sizes = np.concatenate([EXTREME_SHAPES, tiny, usual])
    shapes = np.column_stack([sizes, np.full(500, 3)]).astype(np.int64)
    draws = rng.random((500, NUM_CROP_FLIP_DRAWS), np.float32)
    crops = random_crops(shapes, draws, augment)
    assert (crops[:, 2:] >= 1).all()
    assert (crops[:, :2] >= 0).all()
    assert (crops[:, :2] + crops[:, 2:] <= sizes).all()
    expected = [
        torchvision_crop(int(height), int(width), row, augment)
        for (height, width), row in zip(sizes, draws, strict=True)
    ]
    np.testing.assert_array_equal(crops, expected)


def plsc_crop(height: int, width: int, draws: np.ndarray, augment: AugmentConfig) -> tuple[int, ...]:
    """Return (top, left, height, width) of PLSC's RandCropImage with these uniform numbers, in float64."""
    area_draw, ratio_draw, *position = (float(draws[number]) for number in (0, 10, 20, 21))
    min_ratio, max_ratio = augment.crop_aspect_ratio
    ratio = min_ratio + (max_ratio - min_ratio) * ratio_draw
    low, high = (min(limit, width / height / ratio, height / width * ratio) for limit in augment.crop_scale)
    area = width * height * (low + (high - low) * area_draw)
    h, w = max(math.floor(math.sqrt(area / ratio) + 1e-9), 1), max(math.floor(math.sqrt(area * ratio) + 1e-9), 1)
    return int((height - h + 1) * position[0]), int((width - w + 1) * position[1]), h, w


def test_the_random_crop_is_plscs() -> None:
    rng = np.random.default_rng(2)
    sizes = np.concatenate([EXTREME_SHAPES, rng.integers(1, 700, (491, 2))])
    shapes = np.column_stack([sizes, np.full(500, 3)]).astype(np.int64)
    draws = rng.random((500, NUM_CROP_FLIP_DRAWS), np.float32)
    for scale in ((0.05, 1.0), (0.9, 1.0)):
        augment = AugmentConfig(crop_method="plsc", crop_scale=scale)
        crops = random_crops(shapes, draws, augment)
        assert (crops[:, 2:] >= 1).all() and (crops[:, :2] >= 0).all()
        assert (crops[:, :2] + crops[:, 2:] <= sizes).all()
        expected = [plsc_crop(int(h), int(w), row, augment) for (h, w), row in zip(sizes, draws, strict=True)]
        # Where float32 rounds a side to the next whole number, it differs by a pixel.
        differs = (crops != expected).any(axis=1)
        assert differs.mean() < 0.005 and np.abs(crops - expected).max() <= 1


def test_the_aspect_ratios_have_their_distributions() -> None:
    """In an image in which every crop fits, the ratio is uniform, or uniform in its logarithm, and so is the area."""
    shapes = np.tile([4000, 4000, 3], (3000, 1)).astype(np.int64)
    draws = np.random.default_rng(3).random((3000, NUM_CROP_FLIP_DRAWS), np.float32)
    uniform = stats.uniform(3 / 4, 4 / 3 - 3 / 4)
    p_values = {}
    for method in ("torchvision", "plsc"):
        augment = AugmentConfig(crop_method=method, crop_scale=(0.05, 0.7))
        height, width = random_crops(shapes, draws, augment)[:, 2:].T.astype(float)
        assert stats.kstest(height * width / 4000**2, stats.uniform(0.05, 0.65).cdf).pvalue > 0.01
        for name, distribution in (("plsc", uniform), ("torchvision", stats.loguniform(3 / 4, 4 / 3))):
            p_values[method, name] = stats.kstest(width / height, distribution.cdf).pvalue
    assert all((p_value > 0.01) == (method == name) for (method, name), p_value in p_values.items()), p_values


def test_plscs_area_is_limited_to_what_fits() -> None:
    """In a square, the ratio r limits the area to min(r, 1/r): for a share of 1, the mean is known in closed form."""
    shapes = np.tile([4000, 4000, 3], (3000, 1)).astype(np.int64)
    draws = np.random.default_rng(4).random((3000, NUM_CROP_FLIP_DRAWS), np.float32)
    crops = random_crops(shapes, draws, AugmentConfig(crop_method="plsc", crop_scale=(1.0, 1.0)))
    mean = ((1 - (3 / 4) ** 2) / 2 + math.log(4 / 3)) / (4 / 3 - 3 / 4)
    assert (crops[:, 2:].max(axis=1) == 4000).all()
    assert (crops[:, 2:].prod(axis=1) / 4000**2).mean() == pytest.approx(mean, abs=0.005)


def test_a_crop_is_inside_the_image_for_the_least_and_greatest_draws() -> None:
    min_draw, max_draw = np.float32(0), np.nextafter(np.float32(1), np.float32(0))
    shapes = np.array([[h, w, 3] for h, w in [*EXTREME_SHAPES, *SIZES]], np.int64)
    for draw in (min_draw, max_draw):
        for augment in (AugmentConfig(), AugmentConfig(crop_method="plsc")):
            crops = random_crops(shapes, np.full((len(shapes), NUM_CROP_FLIP_DRAWS), draw), augment)
            assert (crops[:, :2] >= 0).all() and (crops[:, 2:] >= 1).all()
            assert (crops[:, :2] + crops[:, 2:] <= shapes[:, :2]).all()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_pixels_are_pils(photos: list[Path], interpolation: str) -> None:
    """The crop of a draw, resized and sometimes flipped, is within the evaluation's bound, for the same reason."""
    augment = AugmentConfig(interpolation=interpolation)
    draws = ShuffledSampler(len(photos), seed=4).crop_flip_draws(0, len(photos))
    ours = train_pixels(photos, draws, (96, 64), augment)
    num_flipped = 0
    for path, row, image in zip(photos, draws, ours, strict=True):
        image_of_pil = Image.open(path).convert("RGB")
        size = image_of_pil.height, image_of_pil.width
        top, left, height, width = torchvision_crop(*size, row, augment)
        crop = image_of_pil.crop((left, top, left + width, top + height)).resize((64, 96), PIL_FILTERS[interpolation])
        if row[22] < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            num_flipped += 1
        assert difference(image, normalise(crop)) < BOUND, path
    assert 0 < num_flipped < len(photos)


def test_flips_have_the_configured_probability(photos: list[Path]) -> None:
    draws = ShuffledSampler(len(photos), seed=4).crop_flip_draws(0, len(photos))

    def images(flip_probability: float) -> np.ndarray:
        return train_pixels(photos, draws, (64, 64), AugmentConfig(flip_probability=flip_probability))

    never, always, sometimes = images(0.0), images(1.0), images(0.3)
    np.testing.assert_array_equal(always, never[..., ::-1])
    is_flipped = draws[:, 22] < 0.3
    assert 0 < is_flipped.sum() < len(photos)
    np.testing.assert_array_equal(sometimes[is_flipped], always[is_flipped])
    np.testing.assert_array_equal(sometimes[~is_flipped], never[~is_flipped])


def train_loader(
    images: ImageDataset, data: DataConfig, start_step: int = 0, rank: int = 0, size: int = 1
) -> TrainLoader:
    return TrainLoader(
        images,
        (32, 32),
        data,
        AugmentConfig(),
        seed=0,
        start_step=start_step,
        dp_rank=rank,
        dp_size=size,
        device_id=None,
    )


def eval_loader(
    images: ImageDataset, data: DataConfig, batch_size: int = 4, rank: int = 0, size: int = 1
) -> EvalLoader:
    return EvalLoader(images, (32, 32), batch_size, data, EvalConfig(), dp_rank=rank, dp_size=size, device_id=None)


def next_batches(loader: TrainLoader, num_batches: int) -> list[tuple[np.ndarray, ...]]:
    return [tuple(tensor.numpy().copy() for tensor in next(loader)) for _ in range(num_batches)]


def test_pixels_dont_depend_on_threads_start_step_and_ranks(make_set) -> None:
    data = make_set(thirteen_images(num_classes=3))
    images = open_set(data, "train", 3)
    batches = next_batches(train_loader(images, data), 6)
    two_threads = next_batches(train_loader(images, data.model_copy(update={"num_threads": 2})), 6)
    for (pixels, labels), (other_pixels, other_labels) in zip(batches, two_threads, strict=True):
        np.testing.assert_array_equal(pixels, other_pixels)
        np.testing.assert_array_equal(labels, other_labels)

    for (pixels, labels), (other_pixels, other_labels) in zip(
        batches[3:], next_batches(train_loader(images, data, start_step=3), 3), strict=True
    ):
        np.testing.assert_array_equal(pixels, other_pixels)
        np.testing.assert_array_equal(labels, other_labels)

    ranks = [next_batches(train_loader(images, data, rank=rank, size=2), 6) for rank in range(2)]
    for step, (pixels, labels) in enumerate(batches):
        np.testing.assert_array_equal(pixels, np.concatenate([rank[step][0] for rank in ranks]))
        np.testing.assert_array_equal(labels, np.concatenate([rank[step][1] for rank in ranks]))

    assert not np.array_equal(batches[0][0], batches[1][0])


def test_an_image_has_another_crop_each_epoch(make_set) -> None:
    data = make_set({"train/c0/0.jpeg": photo(50, 60)}, global_batch_size=1)
    (first, _), (second, _) = next_batches(train_loader(open_set(data, "train", 1), data), 2)
    assert not np.array_equal(first, second)


def test_a_batch_doesnt_change_while_later_ones_are_read(make_set) -> None:
    """The tensors share DALI's memory, which must not be overwritten while they are used."""
    data = make_set(thirteen_images())
    loader = train_loader(open_set(data, "train", 1), data)
    batches = [next(loader) for _ in range(8)]
    for (pixels, _), (copied, _) in zip(
        batches, next_batches(train_loader(open_set(data, "train", 1), data), 8), strict=True
    ):
        np.testing.assert_array_equal(pixels.numpy(), copied)


@pytest.mark.parametrize(("batch_size", "dp_size"), [(4, 1), (4, 2), (2, 2), (13, 1), (26, 2), (8, 4)])
def test_evaluation_has_every_image_once_with_weight_1(make_set, batch_size: int, dp_size: int) -> None:
    """13 images, each with its own class, over all ranks; the pixels are those of one batch with all images."""
    data = make_set(thirteen_images("val", num_classes=13))
    images = open_set(data, "val", 13)
    (all_pixels,) = [batch[0].numpy().copy() for batch in eval_loader(images, data, batch_size=13)]
    seen: list[int] = []
    num_batches = set()
    for rank in range(dp_size):
        loader = eval_loader(images, data, batch_size, rank, dp_size)
        batches = [[tensor.numpy().copy() for tensor in batch] for batch in loader]
        assert len(batches) == len(loader)
        num_batches.add(len(loader))
        for pixels, labels, weights in batches:
            assert len(pixels) == len(labels) == len(weights) == batch_size // dp_size
            assert set(weights.tolist()) <= {0.0, 1.0}
            np.testing.assert_array_equal(pixels[weights > 0], all_pixels[labels[weights > 0]])
            seen += labels[weights > 0].tolist()
    assert sorted(seen) == list(range(13))
    assert num_batches == {math.ceil(13 / batch_size)}  # the same on all ranks, or their collectives would hang


def test_an_evaluation_can_be_repeated(make_set) -> None:
    data = make_set(thirteen_images("val"))
    loader = eval_loader(open_set(data, "val", 1), data)
    first, second = ([batch[0].numpy().copy() for batch in loader] for _ in range(2))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))


def encode(image: Image.Image, file_format: str, path: Path) -> bytes:
    image.save(path, file_format)
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["cut in half", "without its last bytes", "empty", "text", "a HEIC", "missing"])
@pytest.mark.parametrize("loader", ["train", "eval"])
def test_a_file_that_cant_be_read_or_decoded_is_named(make_set, tmp_path: Path, damage: str, loader: str) -> None:
    intact = encode(photo(60, 80), "JPEG", tmp_path / "intact")
    content = {
        "cut in half": intact[: len(intact) // 2],
        "without its last bytes": intact[:-10],
        "empty": b"",
        "text": b"This is not an image.\n" * 20,
        "a HEIC": b"\0\0\0\x18ftypheic" + bytes(200),
        "missing": intact,
    }[damage]
    data = make_set(thirteen_images(), {"train/c0/broken.jpeg": content})
    images = open_set(data, "train", 1)
    if damage == "missing":
        (tmp_path / "train/c0/broken.jpeg").unlink()
    with pytest.raises(DataError) as error:
        if loader == "train":
            next_batches(train_loader(images, data), 8)  # two epochs
        else:
            list(eval_loader(images, data))
    assert str(tmp_path / "train/c0/broken.jpeg") in str(error.value)
    assert "\n" not in str(error.value)


OTHER_FORMATS = {
    "grey.jpeg": ("L", "JPEG"),
    "cmyk.jpeg": ("CMYK", "JPEG"),
    "upper.JPG": ("RGB", "JPEG"),
    "a.png": ("RGB", "PNG"),
    "alpha.png": ("RGBA", "PNG"),
    "palette.png": ("P", "PNG"),
    "png_named.jpeg": ("RGB", "PNG"),  # ImageNet has one
    "a.bmp": ("RGB", "BMP"),
    "a.webp": ("RGB", "WEBP"),
    "a.tiff": ("RGB", "TIFF"),
}


def test_images_in_all_formats_have_pils_pixels(make_set, tmp_path: Path) -> None:
    files = {
        f"train/c0/{name}": encode(photo(60, 80).convert(mode), file_format, tmp_path / "image")
        for name, (mode, file_format) in OTHER_FORMATS.items()
    }
    data = make_set(files)
    images = open_set(data, "train", 1)
    paths = [Path(images.name(index)) for index in range(len(images))]
    assert sorted(path.name for path in paths) == sorted(OTHER_FORMATS)
    evaluation = EvalConfig(resize="direct")
    for path, ours in zip(paths, eval_pixels(paths, (60, 80), evaluation), strict=True):
        assert difference(ours, eval_pixels_of_pil(path, (60, 80), evaluation)) < BOUND, path.name
    for pixels, _ in next_batches(train_loader(images, data), 3):
        assert np.isfinite(pixels).all()

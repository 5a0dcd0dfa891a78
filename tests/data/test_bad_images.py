"""Damaged and unusual image files are read, or are an error of one line."""

from __future__ import annotations

import json
import math
import os
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.bad_input import MAX_MESSAGE_LENGTH, Trial, cases, damaged, encoded_image, one_line, pytestmark  # noqa: F401
from helpers.sets import UPRIGHT_ON_WHITE
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools import check
from vit_static.common.errors import PredictError
from vit_static.config.data_schema import AugmentConfig, DataConfig, EvalConfig
from vit_static.data.dali_pipeline import preprocessing_pipeline
from vit_static.data.image_set import FileDataset, ImageDataset
from vit_static.data.loader import EvalLoader, TrainLoader, undecodable
from vit_static.data.open_set import open_set
from vit_static.inference.image_io import find_images, read_pixels

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV", "RGBX"]
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "WEBP": ".webp", "TIFF": ".tif"}
SIZES = [(48, 64), (1, 1), (1, 700), (700, 1), (3, 2), (1, 20_000), (20_000, 1), (8, 20_000)]


def png_of(height: int, width: int, depth: int = 8, colours: int = 2, pixels: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def jpeg_of(height: int, width: int) -> bytes:
    content = bytearray(encoded_image("RGB", "JPEG", (48, 64)))
    position = content.index(b"\xff\xc0")
    content[position + 5 : position + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def tiff_of(height: int, width: int) -> bytes:
    content = encoded_image("RGB", "TIFF", (48, 64))
    for tag, value in ((256, width), (257, height)):
        position = (
            content.index(struct.pack("<H", tag) + struct.pack("<H", 3), 8)
            if struct.pack("<HH", tag, 3) in content
            else 0
        )
        position = position or content.index(struct.pack("<HH", tag, 4), 8)
        content = content[:position] + struct.pack("<HHII", tag, 4, 1, value) + content[position + 12 :]
    return content


def bmp_of(height: int, width: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 99, 0, 0, 54) + header + bytes(99)


IMAGE_BOMBS = {
    **{
        f"{make.__name__[:-3]} of {side}": make(side, side)
        for make in (png_of, tiff_of, bmp_of)
        for side in (60_000, 2**31 - 1)
    },
    "jpeg of 65535": jpeg_of(65_535, 65_535),
    "png of one line": png_of(1, 2**31 - 1),
    "png of zeros": png_of(20_000, 20_000, 1, 0, bytes(20_000 * 2501)),
    "png of nothing": png_of(0, 0),
    "png of many bits": png_of(9, 9, 255, 255),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(canary) (w) file closefile\n%%EOF\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "empty": b"",
    "jpeg without an end": b"\xff\xd8" + b"\xff" * 1000,
    "jpeg of segments": b"\xff\xd8" + b"\xff\xe0\0\2" * 50_000,
    "jpeg of no length": b"\xff\xd8\xff\xe0\0\0" * 100,
}

any_picture = st.builds(
    encoded_image, st.sampled_from(MODES), st.sampled_from(list(FORMATS)), st.sampled_from([SIZES[0]] * 6 + SIZES)
)


@st.composite
def any_image(draw: Callable[[Any], Any]) -> tuple[str, bytes]:
    """Return a file's suffix and content: an intact image, a damaged one, or something else."""
    if draw(st.integers(0, 9)) == 0:
        return ".png", draw(st.binary(max_size=100) | st.sampled_from(list(IMAGE_BOMBS.values())))
    file_format = draw(st.sampled_from(list(FORMATS)))
    size = draw(st.sampled_from([SIZES[0]] * 9 + SIZES))
    content = encoded_image(draw(st.sampled_from(MODES)), file_format, size)
    if draw(st.integers(0, 4)):
        content = damaged(content, draw)
    return draw(st.sampled_from([FORMATS[file_format]] * 3 + list(FORMATS.values()))), content


@cases(500)
@given(any_image())
def test_prediction_reads_or_refuses_any_image(trial: Trial, image: tuple[str, bytes]) -> None:
    path = trial.folder / f"image{image[0]}"
    path.write_bytes(image[1])
    with trial.of("images: predict", path.name):
        pixels = read_pixels(path, UPRIGHT_ON_WHITE)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size


@pytest.mark.parametrize("content", IMAGE_BOMBS.values(), ids=IMAGE_BOMBS)
def test_malicious_images_are_refused_without_much_memory(trial: Trial, content: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = trial.folder / "bomb"
    path.write_bytes(content)
    images = FileDataset(trial.folder, one_line(b"bomb"), ["a"])
    with pytest.raises(PredictError, match="bomb"):
        read_pixels(path, UPRIGHT_ON_WHITE)
    ((_, problem),) = undecodable(images, [0])
    assert "bomb" in str(problem)
    for _ in range(2):
        with trial.of("images: bombs", "bomb"):
            raise problem
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@cases(6)
@given(st.lists(any_image(), min_size=16, max_size=16))
def test_images_that_pass_the_check_can_be_trained_on_and_evaluated(
    trial: Trial, image_folder: Path, images: list[tuple[str, bytes]]
) -> None:
    """The others stop a run, with their names."""
    for old in image_folder.rglob("*.*"):
        old.unlink()
    for number, (suffix, content) in enumerate(images):
        path = image_folder / "train" / "ab"[number % 2] / f"{number:02d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    check.main([str(image_folder)])
    report = json.loads((image_folder / "data_check.json").read_text(encoding="utf-8"))
    bad = sorted(problem["path"] for problem in report["problems"] if problem["stops_training"])
    assert all(len(problem["detail"]) < MAX_MESSAGE_LENGTH for problem in report["problems"])
    data = DataConfig(root=str(image_folder), val="train", global_batch_size=4, num_threads=1, num_readers=1)
    all_images = open_set(data, "train", 2)
    if len(bad) < len(images):
        good = open_set(data.model_copy(update={"on_bad_image": "skip"}), "train", 2)
        loader = train_loader(good, data)
        for _ in range(math.ceil(len(good) / 4)):
            assert np.isfinite(np.asarray(next(loader)[0])).all()
        batches = list(eval_loader(good, data))
        assert sum(float(np.asarray(weights).sum()) for _, _, weights in batches) == len(good)
        for _ in range(len(good)):
            with trial.of("images: check, training, evaluation"):
                pass
    problems = {all_images.relative_name(n): problem for n, problem in undecodable(all_images, range(len(all_images)))}
    for position, name in enumerate(bad):
        index = next(index for index in range(len(all_images)) if all_images.relative_name(index) == name)
        with trial.of("images: check, training, evaluation", name):
            if position < 2:
                others = [all_images.relative_name(n) for n in range(len(images)) if n != index]
                next(iter((train_loader, eval_loader)[position](all_images.exclude(others), data)))
            elif name in problems:
                raise problems[name]
            raise AssertionError(f"only the check refuses {name}")


def train_loader(images: ImageDataset, data: DataConfig) -> TrainLoader:
    return TrainLoader(
        images, (16, 16), data, AugmentConfig(), seed=0, start_step=0, dp_rank=0, dp_size=1, device_id=None
    )


def eval_loader(images: ImageDataset, data: DataConfig) -> EvalLoader:
    return EvalLoader(images, (16, 16), 4, data, EvalConfig(), dp_rank=0, dp_size=1, device_id=None)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 2)])
def test_the_evaluation_crops_the_middle_of_a_slim_image(shape: tuple[int, int]) -> None:
    """The result is Pillow's after resizing the entire image to 24 by 480,000 pixels."""
    grey = np.zeros(shape, np.uint8)
    grey[shape[0] // 2 if shape[0] > 2 else 0 :, shape[1] // 2 if shape[1] > 2 else 0 :] = 255
    scale = 24 / min(shape)
    height, width = (round(side * scale) for side in shape)
    top, left = (height - 24) // 2, (width - 24) // 2
    resized = Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((left, top, left + 24, top + 24)), np.float32)
    run = preprocessing_pipeline(1, 1, (24, 24), DataConfig(), EvalConfig(crop_pct=1.0)).run
    actual = np.asarray(run(pixels=[np.repeat(grey[..., None], 3, axis=2)])[0].as_tensor())[0, 0]
    assert expected.max() - expected.min() > 100
    np.testing.assert_allclose((actual + 1.0) * 127.5, expected, atol=1.0)


@pytest.mark.timeout(60)
def test_a_path_that_isnt_a_file_is_refused(trial: Trial, tmp_path: Path) -> None:
    """Folders, pipes, devices, and symbolic links to themselves, with names of images."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "folder.jpg").mkdir()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "nowhere.jpg").symlink_to("nothing")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.jpg")
    names = ["folder", "loop", "nowhere", "device", "pipe"]
    for name in names:
        with trial.of("images: no files", f"{name}.jpg"):
            read_pixels(folder / f"{name}.jpg", UPRIGHT_ON_WHITE)
            raise AssertionError(name)
    found_names = {path.name for path in find_images([tmp_path])}
    assert "folder.jpg" not in found_names and "pipe.jpg" in found_names
    lines = "".join(f"train/a/{name}.jpg 0\n" for name in [*names, "a\0b", "x" * 5000, "../../../../../etc/shadow0"])
    (tmp_path / "list.txt").write_text(lines + "/dev/stdin 0\n")
    images = open_set(DataConfig(root=str(tmp_path), train="list.txt"), "train", 1)
    for index in range(len(images)):
        with trial.of("images: no files", images.relative_name(index)[:50].replace("\0", "\\x00")):
            images.read(index)
            raise AssertionError(index)
    assert check.main([str(tmp_path), "--train", "list.txt"]) == 1
    with trial.of("images: no files", str(folder.parent)):
        open_set(DataConfig(root=str(tmp_path)), "train", 1)
        raise AssertionError


def test_the_check_doesnt_write_through_symbolic_links(trial: Trial, tmp_path: Path) -> None:
    (tmp_path / "set/train/a").mkdir(parents=True)
    (tmp_path / "set/train/a/1.png").write_bytes(encoded_image("RGB", "PNG", (48, 64)))
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "set/data_check.json").symlink_to("../elsewhere")
    assert check.main([str(tmp_path / "set")]) == 0
    (tmp_path / "set/.data_check.journal").symlink_to("../elsewhere")
    with pytest.raises(ValueError, match=r"\.data_check\.journal: is not a regular file"):
        check.main([str(tmp_path / "set")])
    assert (tmp_path / "elsewhere").read_text() == "mine"

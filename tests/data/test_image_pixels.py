"""An image gives the same pixels in training, evaluation, prediction and Pillow, in all formats and orientations."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.pillow_pixels import pillow_pixels
from helpers.sets import UPRIGHT_ON_WHITE, photo
from PIL import ExifTags, Image, ImageCms

from vit_static.common.errors import DataError, PredictError
from vit_static.config.data_schema import AugmentConfig, DataConfig, EvalConfig
from vit_static.data.dali_pipeline import decoding_pipeline, train_pipeline
from vit_static.data.image_headers import scan, simple_orientation
from vit_static.data.image_pixels import DecodeOptions, decode, image_orientation, prepare_for_dali
from vit_static.data.loader import EvalLoader
from vit_static.data.open_set import open_set
from vit_static.data.sampler import NUM_CROP_FLIP_DRAWS
from vit_static.inference.artifact import Preprocessing
from vit_static.inference.image_io import read_pixels, to_pixels
from vit_static.inference.predictor import Preprocessor

PHOTO = photo(36, 52)
# What makes stored pixels [height, width, 3] upright, by orientation: the definition in EXIF 2.32, section 4.6.4
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}


def in_mode(mode: str) -> Image.Image:
    """Return the photo in one of Pillow's modes, with all levels of transparency if it has any."""
    if mode in ("I;16", "F"):
        levels = np.asarray(PHOTO.convert("L")).astype(np.float32)
        return Image.fromarray((levels * 257).astype(np.uint16) if mode == "I;16" else levels / 255.0)
    if mode == "LAB":
        return ImageCms.profileToProfile(
            PHOTO, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )  # type: ignore[return-value]
    image = PHOTO.convert(mode.removesuffix("A") if mode in ("LA", "RGBA") else mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def encode(mode: str, file_format: str, orientation: int = 1, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = orientation
    in_mode(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


def animation(file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    frames = [PHOTO.transpose(method) for method in (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180)]
    PHOTO.save(buffer, file_format, save_all=True, append_images=frames, **options)
    return buffer.getvalue()


TURNED = [
    ("RGB", "JPEG", {"quality": 95}), ("RGB", "JPEG", {"progressive": True}), ("L", "JPEG", {}), ("CMYK", "JPEG", {}),
    ("RGB", "PNG", {}), ("LA", "PNG", {}), ("P", "PNG", {"transparency": 3}), ("I;16", "PNG", {}),
    ("RGB", "WEBP", {}), ("RGB", "WEBP", {"lossless": True}), ("RGBA", "WEBP", {}), ("RGB", "AVIF", {}),
    ("RGB", "TIFF", {}), ("RGBA", "TIFF", {}), ("L", "TIFF", {"compression": "tiff_lzw"}), ("CMYK", "TIFF", {}),
]  # fmt: skip
UPRIGHT_ONLY = [
    *((mode, "TIFF", {"compression": "tiff_adobe_deflate"}) for mode in ("1", "P", "LA", "I;16", "F", "LAB", "YCbCr")),
    ("RGB", "TIFF", {"compression": "jpeg"}), ("RGB", "TIFF", {"compression": "packbits"}), ("L", "AVIF", {}),
    *((mode, "PNG", {}) for mode in ("1", "L", "P", "RGBA")), ("RGB", "PNG", {"transparency": (128, 128, 128)}),
    ("L", "PNG", {"transparency": 128}), ("I;16", "PNG", {"transparency": 128 * 257}), ("P", "PNG", {"bits": 4}),
    *((mode, "BMP", {}) for mode in ("1", "L", "P", "RGB", "RGBA")), ("RGB", "DIB", {}),
    ("L", "GIF", {}), ("RGB", "GIF", {}), ("P", "GIF", {"transparency": 3}),
    *((mode, "PPM", {}) for mode in ("1", "L", "RGB", "I;16", "F")), ("RGBA", "AVIF", {}),
    *((mode, "JPEG2000", {}) for mode in ("L", "RGB", "RGBA", "I;16")),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return files in all formats, modes and orientations, by description."""
    folder = tmp_path_factory.mktemp("images")
    contents = {
        f"{number} {mode} {file_format} {orientation}": encode(mode, file_format, orientation, **options)
        for number, (mode, file_format, options) in enumerate(TURNED)
        for orientation in UPRIGHT
    }
    for number, (mode, file_format, options) in enumerate(UPRIGHT_ONLY, len(TURNED)):
        contents[f"{number} {mode} {file_format}"] = encode(mode, file_format, **options)
    contents["animated PNG with a hidden default image"] = animation("PNG", default_image=True)
    contents |= {f"animated {file_format}": animation(file_format) for file_format in ("PNG", "GIF", "WEBP", "TIFF")}
    for name, content in contents.items():
        (folder / name.replace(" ", "_")).write_bytes(content)
    return {name: folder / name.replace(" ", "_") for name in contents}


@pytest.fixture(scope="module")
def expected(files: dict[str, Path]) -> dict[str, np.ndarray]:
    """Return Pillow's pixels of each file."""
    pixels = {name: pillow_pixels(path)[1] for name, path in files.items()}
    assert all(isinstance(value, np.ndarray) for value in pixels.values()), pixels
    return pixels  # type: ignore[return-value]


def bytes_of(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), np.uint8)


def dali_pixels(prepared: list[np.ndarray]) -> list[np.ndarray]:
    (images,) = decoding_pipeline(len(prepared), 1, None).run(encoded=prepared)
    return [np.array(images.at(index)) for index in range(len(prepared))]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_the_reference_turns_images_as_exif_defines(file_format: str) -> None:
    for orientation, turn in UPRIGHT.items():
        _, pixels = pillow_pixels(io.BytesIO(encode("RGB", file_format, orientation)))
        np.testing.assert_array_equal(pixels, turn(np.asarray(PHOTO)))


def test_training_and_prediction_have_pillows_pixels(files: dict[str, Path], expected: dict[str, np.ndarray]) -> None:
    """DALI's decoder of training; a file, the bytes that `serve` receives, and an open image in prediction."""
    decoded = dali_pixels([prepare_for_dali(bytes_of(path), UPRIGHT_ON_WHITE) for path in files.values()])
    for (name, path), training in zip(files.items(), decoded, strict=True):
        np.testing.assert_array_equal(training, expected[name], err_msg=f"training: {name}")
        np.testing.assert_array_equal(read_pixels(path, UPRIGHT_ON_WHITE), expected[name], err_msg=f"file: {name}")
        received = read_pixels(io.BytesIO(path.read_bytes()), UPRIGHT_ON_WHITE, "it")
        np.testing.assert_array_equal(received, expected[name], err_msg=f"bytes: {name}")
        with Image.open(path) as image:
            np.testing.assert_array_equal(to_pixels(image, UPRIGHT_ON_WHITE), expected[name], err_msg=f"open: {name}")


def test_ordinary_files_are_decoded_by_dali_itself(files: dict[str, Path]) -> None:
    """Their bytes stay as they are; a JPEG only loses its metadata."""
    kept = {
        name
        for name, path in files.items()
        if (prepared := prepare_for_dali(bytes_of(path), UPRIGHT_ON_WHITE)).tobytes() == path.read_bytes()
        or prepared[:2].tobytes() == b"\xff\xd8"
    }
    assert {name.split()[0] for name in kept if "JPEG " in name} == {"0", "1", "2"}  # not CMYK
    others = {" ".join(name.split()[1:]) for name in kept if "JPEG " not in name and "PPM" not in name}
    assert others == {"RGB PNG 1", "1 PNG", "L PNG", "P PNG", "RGB WEBP 1"}
    assert all(scan(bytes_of(files[name])) is None for name in files if "animated" in name)


def test_evaluation_gives_the_model_what_prediction_gives_it(files: dict[str, Path]) -> None:
    """To the last bit, through the reader's threads and the whole preprocessing."""
    root = next(iter(files.values())).parent
    (root / "list.txt").write_text("".join(f"{path.name} 0\n" for path in files.values()))
    data = DataConfig(root=str(root), val="list.txt", num_threads=1, num_readers=2)
    images = open_set(data, "val", 1)
    loader = EvalLoader(images, (24, 24), 64, data, EvalConfig(), dp_rank=0, dp_size=1, device_id=None)
    evaluated = np.concatenate([np.asarray(batch[0]) for batch in loader])[: len(files)]
    fields = EvalConfig().model_dump(include={"resize", "crop_pct", "interpolation", "antialias"})
    preprocessing = Preprocessing(
        image_size=(24, 24), mean=data.mean, std=data.std, orientation="apply", background=(255, 255, 255), **fields
    )
    pixels = [read_pixels(path, preprocessing.to_decode_options()) for path in files.values()]
    np.testing.assert_array_equal(evaluated, Preprocessor(preprocessing, 1)(pixels))


def test_training_crops_the_upright_image(files: dict[str, Path], expected: dict[str, np.ndarray]) -> None:
    """With these draws the crop is the part of the image between 1/4 and 3/4 of its height and width."""
    names = [name for name in files if name[-2] == " " and name[-1].isdigit()]
    prepared = [prepare_for_dali(bytes_of(files[name]), UPRIGHT_ON_WHITE) for name in names]
    draws = np.zeros((len(names), NUM_CROP_FLIP_DRAWS), np.float32)
    draws[:, 20:22] = 0.25
    labels = np.zeros(len(names), np.int64)
    augment = AugmentConfig(crop_scale=(0.25, 0.25), crop_aspect_ratio=(1.0, 1.0))
    source = lambda n: (prepared, labels, draws)  # noqa: E731
    pipeline = train_pipeline(source, len(names), (8, 8), DataConfig(num_threads=1), augment, None, "decode")
    crops = pipeline.run()[0]
    for index, name in enumerate(names):
        crop = np.array(crops.at(index))
        height, width = expected[name].shape[:2]
        y, x = (int(0.25 * (side - length + 1)) for side, length in zip((height, width), crop.shape[:2], strict=True))
        part = expected[name][y : y + crop.shape[0], x : x + crop.shape[1]]
        np.testing.assert_array_equal(crop, part, err_msg=name)
        assert crop.shape[:2] == (22, 22)  # a quarter of 36 * 52


@pytest.mark.parametrize(("mode", "file_format", "options"), TURNED)
def test_orientation_and_transparency_can_be_left_as_they_are(mode: str, file_format: str, options: Any) -> None:
    """As stored, and with the hidden colours, in training and in prediction."""
    options = {**options, "lossless": True} if (mode, file_format) == ("RGBA", "WEBP") else options
    contents = [encode(mode, file_format, orientation, **options) for orientation in UPRIGHT]
    as_stored = DecodeOptions("ignore", None)
    with Image.open(io.BytesIO(contents[0])) as image:
        stored = np.asarray(image.convert("RGB")) if mode != "I;16" else read_pixels(io.BytesIO(contents[0]), as_stored)
    trained = dali_pixels([prepare_for_dali(np.frombuffer(content, np.uint8), as_stored) for content in contents])
    for content, pixels in zip(contents, trained, strict=True):
        np.testing.assert_array_equal(pixels, stored)
        np.testing.assert_array_equal(read_pixels(io.BytesIO(content), as_stored), stored)


def test_files_of_many_bytes_are_decoded() -> None:
    """Their number of bytes isn't a float32."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((2401, 2404)).save(buffer, "GIF")
    prepared = prepare_for_dali(np.frombuffer(buffer.getvalue(), np.uint8), UPRIGHT_ON_WHITE)
    assert int(np.float32(len(prepared))) != len(prepared)
    np.testing.assert_array_equal(dali_pixels([prepared])[0], read_pixels(buffer, UPRIGHT_ON_WHITE, "it"))


def test_transparent_pixels_are_composed_onto_the_background() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 100, 0, 255), (200, 100, 0, 0), (200, 100, 0, 51)])
    options = DecodeOptions("apply", (0, 50, 250))
    expected = [[200, 100, 0], [0, 50, 250], [40, 60, 200]]  # the last one: a fifth of the colour
    for file_format in ("PNG", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        image.save(buffer, file_format, **({"lossless": True, "exact": True} if file_format == "WEBP" else {}))
        encoded = np.frombuffer(buffer.getvalue(), np.uint8)
        assert dali_pixels([prepare_for_dali(encoded, options)])[0][0].tolist() == expected, file_format
        assert read_pixels(buffer, options, "it")[0].tolist() == expected


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(content)) + content


def exif(orientation: int, kind: int = 3, magic: bytes = b"MM\0*") -> bytes:
    value = struct.pack(">HH", orientation, 0) if kind == 3 else struct.pack(">I", orientation)
    entry = struct.pack(">IHHHI", 8, 1, 274, kind, 1) + value + bytes(4)
    return segment(0xE1, b"Exif\0\0" + magic + entry)


XMP = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/' tiff:Orientation=\"6\"/>")
ODD_METADATA = {
    "two orientations": exif(6) + exif(3),  # which ends the process in DALI 2.4
    "XMP": XMP,
    "XMP and EXIF": XMP + exif(3),
    "orientation as LONG": exif(6, kind=4),
    "orientation 0": exif(0),
    "orientation 9": exif(9),
    "damaged EXIF": exif(6, magic=b"MM\0+"),
    "short EXIF": segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08"),
    "a comment": segment(0xFE, b"\xff\xd8\xff\xe1 no marker"),
    "many segments": segment(0xE2, bytes(65_000)) * 20 + exif(8),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unusual_metadata_is_read_as_pillow_reads_it() -> None:
    plain = encode("RGB", "JPEG", quality=95)
    contents = [plain[:2] + metadata + plain[2:] for metadata in ODD_METADATA.values()]
    decoded = dali_pixels(
        [prepare_for_dali(np.frombuffer(content, np.uint8), UPRIGHT_ON_WHITE) for content in contents]
    )
    for name, content, pixels in zip(ODD_METADATA, contents, decoded, strict=True):
        reference = pillow_pixels(io.BytesIO(content))[1]
        np.testing.assert_array_equal(pixels, reference, err_msg=name)
        np.testing.assert_array_equal(read_pixels(io.BytesIO(content), UPRIGHT_ON_WHITE, "it"), reference, err_msg=name)


def test_damaged_exif_is_read_as_pillow_reads_it() -> None:
    """Wherever the quick reader of orientations gives an answer, it is Pillow's."""
    generator = np.random.default_rng(0)
    plain = encode("RGB", "JPEG")
    exif_data = Image.Exif()
    exif_data.update({271: "Maker", 274: 6, 282: 72.0, 306: "2026:01:01 00:00:00", 0x8769: {36867: "2026"}})
    segments = [segment(0xE1, exif_data.tobytes()), exif(8), exif(1) + XMP, XMP]
    answers = []
    for number in range(600):
        metadata = bytearray(segments[number % len(segments)])
        for position in generator.integers(10, len(metadata), number % 4):
            metadata[position] = generator.integers(256)
        encoded = np.frombuffer(plain[:2] + bytes(metadata) + plain[2:], np.uint8)
        header = scan(encoded)
        orientation = None if header is None else simple_orientation(encoded, header)
        if orientation is not None:
            answers.append(orientation)
            with Image.open(io.BytesIO(encoded.data)) as image:
                assert image_orientation(image) == orientation, bytes(metadata)
    assert len(answers) > 150 and set(answers) >= {1, 6, 8}


def damaged_files() -> dict[str, tuple[bytes, str, str]]:
    """Return contents that can't be read, with the kind of the error and a part of its message."""
    jpeg, png, webp, tiff = (encode("RGB", name) for name in ("JPEG", "PNG", "WEBP", "TIFF"))
    return {
        "half a JPEG": (jpeg[: len(jpeg) // 2], "truncated", "truncated"),
        "JPEG without its end": (jpeg[:-2], "truncated", "truncated"),
        "JPEG that ends in its header": (jpeg[:300], "truncated", "truncated"),
        "half a PNG": (png[: len(png) // 2], "truncated", "truncated"),
        "half a WebP": (webp[: len(webp) // 2], "unreadable", "can't be read"),
        "half a TIFF": (tiff[: len(tiff) // 2], "truncated", "truncated"),
        "text": (b"This is not an image.\n" * 20, "unreadable", "unknown format"),
        "HEIC": (
            b"\0\0\0\x18ftypheic" + bytes(90),
            "unsupported",
            "a HEIC image, which is not supported; save it as PNG",
        ),
        "SVG": (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported", "an SVG drawing"),
        "PDF": (b"%PDF-1.7\n" + bytes(90), "unsupported", "a PDF file"),
        "raw file": (encode("RGB", "TIFF", tiffinfo={254: 1}), "unsupported", "a camera's raw file"),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_training_and_prediction_refuse_the_same_files(name: str) -> None:
    content, kind, message = damaged_files()[name]
    message = f"(?i){message}"
    with pytest.raises(DataError, match=message) as error:
        prepare_for_dali(np.frombuffer(content, np.uint8), UPRIGHT_ON_WHITE)
    assert error.value.kind == kind
    with pytest.raises(PredictError, match=message):
        read_pixels(io.BytesIO(content), UPRIGHT_ON_WHITE, "the image")


def test_an_export_without_a_record_is_used_as_its_version_read_images() -> None:
    fields = EvalConfig().model_dump(include={"resize", "crop_pct", "interpolation", "antialias"})
    older = Preprocessing(image_size=(24, 24), mean=(0.5,) * 3, std=(0.5,) * 3, **fields)
    assert older.to_decode_options() == DecodeOptions("ignore", None)


def test_what_a_decoder_raises_as_bytes_is_a_reason_in_words() -> None:
    """Pillow's PPM decoder does so."""
    with pytest.raises(DataError) as raised:
        decode(io.BytesIO(b"P6 " + b"1" * 40 + b" 1 255\n"), UPRIGHT_ON_WHITE)
    assert "Token too long in file header" in str(raised.value) and "b'" not in str(raised.value)

"""Pictures of an evaluation for trackers: the confusion matrix, and the worst images beside correct ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from vit_static.common.drawing import apply_colormap, enlarge_pixels, image_grid
from vit_static.common.errors import escape
from vit_static.report.error_analysis import CorrectImage, ErrorAnalysis, MisclassifiedImage

_SIDE, _NUM_COLUMNS = 160, 6  # of a picture in the grid, in pixels
_MATRIX_SIDE = 480


def draw_pictures(analysis: ErrorAnalysis) -> dict[str, bytes]:
    """Return PNG files by name."""

    def name(label: int) -> str:
        return escape(analysis.class_names.get(label, str(label)))

    pictures = {}
    if analysis.matrix is not None:
        pictures["eval/confusion_matrix"] = _to_png(_draw_matrix(np.array(analysis.matrix)))
    wrong = [f"{name(image.predicted)}, is {'/'.join(map(name, image.labels))}" for image in analysis.images]
    if grid := _draw_images(analysis.images, wrong, "predicted wrongly, the highest loss first"):
        pictures["eval/wrong"] = grid
    correct = [name(image.label) for image in analysis.examples]
    if grid := _draw_images(analysis.examples, correct, "predicted correctly"):
        pictures["eval/correct"] = grid
    return pictures


def _draw_matrix(matrix: np.ndarray) -> np.ndarray:
    """Draw the share of each label's images (rows) that are predicted as each class (columns)."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    picture = enlarge_pixels(apply_colormap(shares), max(_MATRIX_SIDE // len(matrix), 1))
    title = "rows: labels, columns: predictions;\nshares of the label's images"
    return image_grid([picture], None, 1, title, colour_bar=("0", "1"))


def _draw_images(
    images: Sequence[MisclassifiedImage | CorrectImage], captions: Sequence[str], title: str
) -> bytes | None:
    pairs = [(image.thumbnail, caption) for image, caption in zip(images, captions, strict=True) if image.thumbnail]
    if not pairs:
        return None
    pictures = [_read_thumbnail(thumbnail) for thumbnail, _ in pairs]
    return _to_png(image_grid(pictures, [caption for _, caption in pairs], _NUM_COLUMNS, title))


def _read_thumbnail(thumbnail: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(thumbnail))) as image:
        return np.asarray(ImageOps.pad(image.convert("RGB"), (_SIDE, _SIDE), color="white"))


def _to_png(picture: np.ndarray) -> bytes:
    Image.fromarray(picture).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()

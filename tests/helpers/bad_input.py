"""Generators of bad input, and the check that it is read or refused in one line.

Hypothesis generates the same cases every time. BAD_INPUT_TIMES=10 generates ten times as many, for a longer search.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from vit_static.common.errors import UserError
from vit_static.data.list_file import ImageList, Labels

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Duplicate name"),  # from zipfile, for files that the tests write
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

MAX_MESSAGE_LENGTH = 400  # characters, without the test's folder


def cases(count: int) -> Callable[[Any], Any]:
    """Return hypothesis's settings for a test with `count` cases."""
    return settings(
        max_examples=count * int(os.environ.get("BAD_INPUT_TIMES", "1")),
        deadline=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Trial:
    """Counts cases, and checks that whatever is refused is refused with one clear line."""

    def __init__(self, count: Callable[..., None], folder: Path) -> None:
        self._count, self.folder = count, folder

    @contextlib.contextmanager
    def of(self, kind: str, *names: str) -> Iterator[None]:
        """Run one case of a kind, which may raise UserError with a message that contains one of `names`."""
        self._count(kind)
        outcome = "accepted"
        try:
            yield
        except UserError as error:
            outcome = "refused"
            message = str(error)
            is_clear = (
                (message.isprintable() and message.strip() == message != "")
                and len(message.replace(str(self.folder), "")) <= MAX_MESSAGE_LENGTH
                and (not names or any(name in message for name in names))
            )
            if not is_clear:
                raise AssertionError(f"{names}: {message[:1000]!r}") from None
        self._count(kind, 1, outcome)


@pytest.fixture(scope="module")
def trial(tally: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(tally, tmp_path_factory.mktemp("bad"))


ODD_TEXTS = [
    *(
        "",
        " ",
        "../x",
        "..",
        ".",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "-rf",
        "~",
        "x" * 300,
        "é" * 150,
        "\0",
        "\x1b[2J",
        "\u202e",
    ),
    *(
        "007",
        "7",
        "1e3",
        "1_000",
        "0x10",
        "yes",
        "null",
        "=",
        "2024-01-01",
        "nan",
        ".inf",
        "B/16",
        "auto",
        "\ud800",
        "\udcff",
    ),
    *("%s{}", "${HOME}", "!!python/object/apply:os.system ['true']", "*a", "&a", "a: b", "[", "}", "#", "@", "`", "<<"),
]
ODD_NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.0, -0.0, 5e-324, 1e308, float("nan"), float("inf")]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 9)
    | st.floats()
    | st.floats(0.0, 1.0)
    | st.sampled_from(ODD_NUMBERS)
    | st.sampled_from(ODD_TEXTS[:27] + ODD_TEXTS[29:])
    | st.text(max_size=20)
    | st.binary(max_size=5)
    | st.dates()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def damaged(content: bytes, draw: Callable[[Any], Any]) -> bytes:
    """Damage content: truncate it, flip bits, fill or move a part of it, or add bytes."""
    damage, size = draw(st.sampled_from(["cut", "flip", "flip at the start", "fill", "move", "add"])), len(content)
    changed = bytearray(content)
    if size == 0 or damage == "cut":
        return content[: draw(st.integers(0, max(size - 1, 0)))]
    start = draw(st.integers(0, size - 1))
    stop = min(start + draw(st.integers(1, 64)), size)
    if damage.startswith("flip"):
        last = size - 1 if damage == "flip" else min(size - 1, 400)
        for index in draw(st.lists(st.integers(0, last), min_size=1, max_size=8)):
            changed[index] ^= 1 << draw(st.integers(0, 7))
    elif damage == "fill":
        changed[start:stop] = bytes([draw(st.sampled_from([0, 255, 127, 48]))]) * (stop - start)
    elif damage == "move":
        target = draw(st.integers(0, size - 1))
        changed[target:target] = changed[start:stop]
    else:
        changed += draw(st.binary(min_size=1, max_size=50))
    return bytes(changed)


def nested(start: bytes, num_levels: int) -> bytes:
    """Return pickle opcodes that nest an object in tuples, each with the previous one twice: 2**num_levels leaves."""
    return start + b"2\x86" * num_levels  # DUP, TUPLE2


@functools.cache
def encoded_image(mode: str, file_format: str, size: tuple[int, int]) -> bytes:
    """Return an image file, in the nearest mode that the format supports; `size` is height and width."""
    if file_format == "WEBP":
        size = (min(size[0], 16_383), min(size[1], 16_383))
    levels = np.linspace(0.0, 1.0, size[0] * size[1]).reshape(size)
    if mode == "F":
        image = Image.fromarray(levels.astype(np.float32))
    elif mode.startswith("I"):
        image = Image.fromarray((levels * 65535).astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        colours = np.stack([levels, levels.T.reshape(size), 1.0 - levels], axis=-1)
        image = Image.fromarray((colours * 255).astype(np.uint8))
        with contextlib.suppress(ValueError):
            image = image.convert(mode)
    file = io.BytesIO()
    try:
        image.save(file, file_format)
    except (OSError, KeyError, ValueError):
        image.convert("L" if mode[0] in "IF" else "RGB").save(file, file_format)
    return file.getvalue()


def one_line(path: bytes) -> ImageList:
    """Return a list file of one image with label 0."""
    return ImageList(np.frombuffer(path, np.uint8), np.array([0]), np.array([len(path)]), Labels(np.zeros(1, np.int32)))


json_values: st.SearchStrategy[Any] = st.sampled_from(
    [None, 0, -1, 1, 2, 12, 10**6, 2**63, 1e-30, 1e30, "", "x", "float16", "sigmoid", True, [], [0], [1, 1], {}]
)

"""Whatever lies in a config, a file of weights, a data set or a model's folder: it is read, or refused in one line.

Hypothesis makes the cases, the same ones every time. For a longer hunt, BAD_INPUT_TIMES=10 makes ten times as many.
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
    pytest.mark.filterwarnings("ignore:Duplicate name"),  # zipfile's, of those that are written here
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

LONGEST_MESSAGE = 400  # without the folder that the test is in


def cases(count: int) -> Callable[[Any], Any]:
    """How many hypothesis makes."""
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
    """Counts a case, and holds what refuses it to a message of one line that names what it should."""

    def __init__(self, count: Callable[..., None], folder: Path) -> None:
        self._count, self.folder = count, folder

    @contextlib.contextmanager
    def of(self, kind: str, *names: str) -> Iterator[None]:
        """What may be refused; `names`: what the message must have one of."""
        self._count(kind)
        outcome = "accepted"
        try:
            yield
        except UserError as error:
            outcome = "refused"
            message = str(error)
            is_clear = (
                (message.isprintable() and message.strip() == message != "")
                and len(message.replace(str(self.folder), "")) <= LONGEST_MESSAGE
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
    """Cut off, with bits flipped, with a stretch set to one value or put elsewhere."""
    harm, size = draw(st.sampled_from(["cut", "flip", "flip at the start", "fill", "move", "add"])), len(content)
    changed = bytearray(content)
    if size == 0 or harm == "cut":
        return content[: draw(st.integers(0, max(size - 1, 0)))]
    start = draw(st.integers(0, size - 1))
    stop = min(start + draw(st.integers(1, 64)), size)
    if harm.startswith("flip"):
        last = size - 1 if harm == "flip" else min(size - 1, 400)
        for place in draw(st.lists(st.integers(0, last), min_size=1, max_size=8)):
            changed[place] ^= 1 << draw(st.integers(0, 7))
    elif harm == "fill":
        changed[start:stop] = bytes([draw(st.sampled_from([0, 255, 127, 48]))]) * (stop - start)
    elif harm == "move":
        to = draw(st.integers(0, size - 1))
        changed[to:to] = changed[start:stop]
    else:
        changed += draw(st.binary(min_size=1, max_size=50))
    return bytes(changed)


def nested(start: bytes, times: int) -> bytes:
    return start + b"2\x86" * times  # a tuple of the last thing twice


@functools.cache
def picture(mode: str, file_format: str, size: tuple[int, int]) -> bytes:
    """An image file, in the nearest mode that the format has; `size` is height and width."""
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
    return ImageList(np.frombuffer(path, np.uint8), np.array([0]), np.array([len(path)]), Labels(np.zeros(1, np.int32)))


json_values = st.sampled_from(
    [None, 0, -1, 1, 2, 12, 10**6, 2**63, 1e-30, 1e30, "", "x", "float16", "sigmoid", True, [], [0], [1, 1], {}]
)

"""Damaged images in full batches: none of them ends the process by a signal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.sets import photo
from helpers.small import ROOT

# DALI's main thread reads the headers of a batch's second half while another thread reads the first half. This
# position shows the race of NVIDIA/DALI#2894 every time.
_DECODE_FULL_BATCHES = """
import sys
import numpy as np
from vit_static.data.dali_pipeline import decoding_pipeline
with open(sys.argv[1], "rb") as file:
    batch = [np.frombuffer(file.read(), np.uint8)] * 256
batch[128] = np.frombuffer(b"This is not an image.", np.uint8)
for _ in range(5):
    try:
        decoding_pipeline(256, 1, None).run(encoded=batch)
    except RuntimeError:
        continue
    raise SystemExit("a text was decoded")
"""


def test_a_file_without_a_header_is_an_error_of_its_batch(tmp_path: Path) -> None:
    photo(200, 200).save(tmp_path / "intact.jpeg")
    command = [sys.executable, "-c", _DECODE_FULL_BATCHES, str(tmp_path / "intact.jpeg")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.reliability
def test_damaged_files_are_read_or_refused_by_name(tally: Callable[..., None]) -> None:
    """A few of the files of tests/data/sweep_damaged_images.py; BAD_INPUT_TIMES=100 sweeps 2,000."""
    count = 20 * int(os.environ.get("BAD_INPUT_TIMES", "1"))
    command = [sys.executable, ROOT / "tests/data/sweep_damaged_images.py", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    tally("images: damaged, in full batches", count)

"""The decoder in a child process: crashes and hangs are findings about images, and other images are read."""

from __future__ import annotations

import io

import numpy as np
import pytest
from helpers import fragile_decoder
from helpers.sets import photo

from vit_static.data import decoder_process
from vit_static.data.decoder_process import DecoderProcess


def test_a_crash_or_a_hang_is_a_finding_about_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "answer_batches", fragile_decoder.answer_batches)
    file = io.BytesIO()
    photo(20, 30).save(file, "JPEG")
    intact = np.frombuffer(file.getvalue(), np.uint8)
    crash, hang = (np.frombuffer(text, np.uint8) for text in (b"crash now", b"hang now"))
    with DecoderProcess(1, time_limit_s=10.0) as decoder:
        reports = decoder.reports([intact, crash, intact, intact[:200]])
        assert [report.fault and report.fault.kind for report in reports] == [None, "unreadable", None, "truncated"]
        assert reports[1].fault is not None and "crash (SIGSEGV)" in reports[1].fault.reason
        header = reports[2].header
        assert header is not None and (header.format, header.width, header.height) == ("JPEG", 30, 20)
        (report,) = decoder.reports([hang])
        assert report.fault is not None and "doesn't finish within 10 s" in report.fault.reason
        assert decoder.reports([intact])[0].fault is None

"""The decoder in a child process: crashes and hangs are findings about images, and other images are read."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
import pytest
from helpers import fragile_decoder
from helpers.sets import photo
from helpers.small import ROOT

from vit_static.data import decoder_process, fork_server
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


def send_parent(connection: Connection) -> None:
    connection.send((os.getppid(), decoder_process.DALI_MODULE in sys.modules))


def test_processes_are_forked_from_one_that_has_imported_dali() -> None:
    """That is another process than this one, and the same for all."""
    answers = []
    for _ in range(2):
        ours, theirs = Pipe()
        fork_server.start_process(send_parent, theirs).join()
        answers.append(ours.recv())
    assert answers[0] == answers[1] and answers[0][0] != os.getpid() and answers[0][1]


def test_the_check_of_images_imports_dali_only_in_the_child() -> None:
    code = "import sys, data_tools.check; sys.exit('nvidia.dali' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)

"""The check of the export: right programs pass, wrong ones are refused, in processes that haven't trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.doctor import Doctor, make_subject

from vit_static.doctor.check import perform
from vit_static.doctor.checks import BY_NAME


@pytest.mark.slow
@pytest.mark.needs_paddle2onnx
def test_an_export_in_int8_passes(doctor: Doctor) -> None:
    """(test_runner.py has the one in float32.)"""
    report = doctor("-o", "export.precision=int8", only=("export",))
    assert "ok      export      one block in int8" in report.line("export")


def test_a_program_with_other_weights_fails(doctor: Doctor) -> None:
    save = "    program = InferenceModel(model, dtype)\n"
    doctor.break_package("export/exporter.py", save, f"    model.head.bias.set_value(model.head.bias + 0.01)\n{save}")
    compare = "    sessions = _open_sessions(folder, spec)\n"
    doctor.break_package(
        "export/exporter.py", compare, f"    model.head.bias.set_value(model.head.bias - 0.01)\n{compare}"
    )
    line = doctor(only=("export",)).line("export")
    assert line.startswith("FAILED") and "model.json (float32): an output differs from the model's by 1.0e-02" in line
    assert "set -o export.precision=float32" in line


def test_a_precision_that_the_machine_lacks_fails(tmp_path: Path) -> None:
    result = perform(BY_NAME["export"], make_subject(tmp_path, "export.precision=float16"))
    assert result.status == "failed" and "float16: needs a GPU" in result.message
    assert result.remedy == "set -o export.precision=float32"

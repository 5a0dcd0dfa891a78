"""Files of a newer version are named as such, whichever file says so, and nothing advises to begin again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers.runs import TINY

from vit_static.checkpoint.folder import FORMAT, checkpoint_dir
from vit_static.common.errors import PredictError, UserError, WeightsError, newer_format
from vit_static.config.loader import load_config
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import Config
from vit_static.doctor import record
from vit_static.inference.artifact import SPEC_FILE, SPEC_FORMAT, read_spec
from vit_static.report.error_analysis import EVALUATION_FILE
from vit_static.report.page import write_report
from vit_static.report.run_log import METRICS_FILE
from vit_static.train.trainer import train
from vit_static.weights.model_record import RECORD_NAME, decode_record, encode_record
from vit_static.weights.source import load_weights

pytestmark = pytest.mark.reliability("files: of a newer version")

NEWER = r"was written by a newer version \(format {}\); this one reads up to {}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Config:
    """A run of one step, with its checkpoint, its log and its error analysis."""
    folder = tmp_path_factory.mktemp("newer")
    (folder / "tiny.yaml").write_text(TINY)
    overrides = [f"data.root={small_digits}", f"output_dir={folder / 'output'}", "train.max_steps=1", "model.depth=1"]
    config = load_config(folder / "tiny.yaml", overrides)
    train(config)
    return config


def set_format(path: Path, number: int) -> None:
    """Change the format number in a JSON file or in the header of a .safetensors file."""
    if path.suffix == ".json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": number}))
        return
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(arrays, path, {**metadata, "format": str(number)})


@pytest.mark.parametrize(
    "names", [["manifest.json"], ["meta.json"], ["rank_00000.safetensors"], ["manifest.json", "meta.json"]]
)
@pytest.mark.parametrize("use", ["resume", "load"])
def test_one_file_of_a_newer_checkpoint_is_enough(trained: Config, names: list[str], use: str) -> None:
    folder = checkpoint_dir(trained.run_dir, 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    uses: dict[str, Callable[[], object]] = {"resume": lambda: train(trained), "load": lambda: load_weights(folder)}
    try:
        for name in names:
            set_format(folder / name, FORMAT + 1)
        with pytest.raises(WeightsError, match=NEWER.format(FORMAT + 1, FORMAT)) as error:
            uses[use]()
    finally:
        for name, content in before.items():
            (folder / name).write_bytes(content)
    assert "damaged" not in str(error.value) and "--resume never" not in str(error.value)
    assert "resume with the version that wrote it" in str(error.value)


def test_a_newer_checkpoint_with_an_unreadable_manifest(trained: Config) -> None:
    folder = checkpoint_dir(trained.run_dir, 1)
    before = {name: (folder / name).read_bytes() for name in ("manifest.json", "meta.json")}
    try:
        (folder / "manifest.json").write_bytes(b"\x00 another kind of file")
        set_format(folder / "meta.json", 9)
        with pytest.raises(WeightsError, match=NEWER.format(9, FORMAT)):
            load_weights(folder)
    finally:
        for name, content in before.items():
            (folder / name).write_bytes(content)


def test_the_files_of_a_run(trained: Config) -> None:
    for name, change in (
        (METRICS_FILE, lambda text: text.replace('"format": 1', '"format": 2', 1)),
        (EVALUATION_FILE, lambda text: text.replace('"format":1', '"format":2').replace('"step"', '"last_step"')),
    ):
        path = trained.run_dir / name
        text = path.read_text()
        assert change(text) != text
        try:
            path.write_text(change(text))
            with pytest.raises(UserError, match=NEWER.format(2, 1)):
                write_report(trained.run_dir)
        finally:
            path.write_text(text)
    write_report(trained.run_dir)


def test_an_exported_folder(tmp_path: Path) -> None:
    for content in ({"format": SPEC_FORMAT + 1, "unknown": []}, {"format": SPEC_FORMAT + 1}):
        (tmp_path / SPEC_FILE).write_text(json.dumps(content))
        with pytest.raises(PredictError, match=NEWER.format(SPEC_FORMAT + 1, SPEC_FORMAT)):
            read_spec(tmp_path)
    (tmp_path / SPEC_FILE).write_text('{"format": 1}')
    with pytest.raises(PredictError, match="is from another version's export"):
        read_spec(tmp_path)


def test_the_record_of_the_model_in_weights(tmp_path: Path) -> None:
    model = ModelConfig(depth=3)
    values = json.loads(encode_record(model))
    assert decode_record(encode_record(model), "x") == model and values.pop("format") == 1
    assert decode_record(json.dumps(values), "x") == model  # as it was before it had a format
    newer = json.dumps({**values, "format": 2, "unknown": 1})
    safetensors.numpy.save_file({"a": np.zeros(1, np.float32)}, tmp_path / "a.safetensors", {RECORD_NAME: newer})
    with pytest.raises(WeightsError, match=f"a.safetensors: its record of the model {NEWER.format(2, 1)}"):
        load_weights(tmp_path / "a.safetensors")


def test_the_record_of_doctor_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "vit_static/doctor.json"
    path.parent.mkdir()
    setting = {"config": "a"}
    path.write_text(json.dumps([{"setting": setting}]))  # as it was before it had a format
    assert record.has_passed(setting)
    record.write_pass({"config": "b"}, "b")
    assert record.has_passed(setting) and json.loads(path.read_text())["format"] == 1
    newer = json.dumps({"format": 2, "by_setting": {}})
    path.write_text(newer)
    record.write_pass(setting, "a")
    assert (
        path.read_text() == newer
        and "doctor.json: was written by a newer version (format 2)" in capsys.readouterr().err
    )
    assert not record.has_passed(setting)


def test_only_a_larger_whole_number_is_a_newer_format() -> None:
    assert [newer_format(saved, 4) for saved in (4, 3, -1, None, "5", 5.0, True, [5])] == [None] * 8
    assert newer_format(5, 4) == "was written by a newer version (format 5); this one reads up to 4"
    assert "thousands of digits" in str(newer_format(10**5000, 4))

"""Damaged and malicious checkpoints are read, or refused in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.bad_input import Trial, cases, damaged, json_values, pytestmark  # noqa: F401
from helpers.runs import TINY
from hypothesis import given
from hypothesis import strategies as st

from vit_static.checkpoint.folder import checkpoint_dir
from vit_static.checkpoint.resume import read_progress, verify_files
from vit_static.common.errors import UserError
from vit_static.config.loader import load_config
from vit_static.train.trainer import train
from vit_static.weights.source import load_weights


@pytest.fixture(scope="module")
def intact_files(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> dict[str, bytes]:
    """The files of a run's checkpoint, by name."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "tiny.yaml").write_text(TINY)
    overrides = [f"data.root={small_digits}", f"output_dir={folder / 'output'}", "train.max_steps=1", "model.depth=1"]
    config = load_config(folder / "tiny.yaml", overrides)
    train(config)
    return {path.name: path.read_bytes() for path in checkpoint_dir(config.run_dir, 1).iterdir()}


@pytest.fixture(scope="module")
def accepts_checkpoint(trial: Trial) -> Callable[..., None]:
    """accepts_checkpoint(files): read all of a checkpoint that has these files, or see it refused in one line."""
    folder = trial.folder / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)

    def accepts(files: dict[str, bytes | None]) -> None:
        for name, content in files.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        with trial.of("checkpoints", str(folder), *files):
            verify_files(folder)
            read_progress(folder)
            load_weights(folder)

    accepts.folder = folder  # type: ignore[attr-defined]
    return accepts


@cases(150)
@given(st.data())
def test_damaged_files(accepts_checkpoint, intact_files: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(intact_files)))
    is_missing = data.draw(st.integers(0, 9)) == 0
    content = None if is_missing else damaged(intact_files[name], data.draw)
    accepts_checkpoint({**intact_files, name: content})
    if content != intact_files[name]:
        with pytest.raises(UserError):
            verify_files(accepts_checkpoint.folder)


@cases(200)
@given(st.data())
def test_malicious_files_with_a_matching_manifest(
    accepts_checkpoint, intact_files: dict[str, bytes], data: st.DataObject
) -> None:
    files: dict[str, bytes] = dict(intact_files)
    name = data.draw(st.sampled_from(["meta.json", "rank_00000.safetensors", "manifest.json", "class_names.txt"]))
    if name.endswith(".json"):
        content = json.loads(files[name])
        mapping = data.draw(st.sampled_from([content, *(value for value in content.values() if type(value) is dict)]))
        key = data.draw(st.sampled_from(sorted(mapping)))
        mapping[key] = data.draw(json_values)
        files[name] = json.dumps(content).encode()
    else:
        files[name] = damaged(files[name], data.draw)
    if name != "manifest.json":
        manifest = json.loads(files["manifest.json"])
        manifest["files"][name] = {"num_bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        files["manifest.json"] = json.dumps(manifest).encode()
    accepts_checkpoint(files)

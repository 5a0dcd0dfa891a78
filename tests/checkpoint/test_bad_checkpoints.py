"""Damaged checkpoints are read, or refused in one line."""

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
from vit_static.weights import source as source_module


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> dict[str, bytes]:
    """The files of one that a run has written."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "tiny.yaml").write_text(TINY)
    overrides = [f"data.root={small_digits}", f"output_dir={folder / 'output'}", "train.max_steps=1", "model.depth=1"]
    run = load_config(folder / "tiny.yaml", overrides)
    train(run)
    return {path.name: path.read_bytes() for path in checkpoint_dir(run.run_dir, 1).iterdir()}


@pytest.fixture(scope="module")
def accepts_checkpoint(trial: Trial) -> Callable[..., None]:
    folder = trial.folder / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)

    def accepts(files: dict[str, bytes | None]) -> None:
        """All that is read of it: where the run stands, its weights."""
        for name, content in files.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        with trial.of("checkpoints", str(folder), *files):
            verify_files(folder)
            read_progress(folder)
            source_module.load_weights(folder)

    accepts.folder = folder  # type: ignore[attr-defined]
    return accepts


@cases(150)
@given(st.data())
def test_damaged_checkpoints(accepts_checkpoint, whole_checkpoint: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(whole_checkpoint)))
    is_missing = data.draw(st.integers(0, 9)) == 0
    changed = None if is_missing else damaged(whole_checkpoint[name], data.draw)
    accepts_checkpoint({**whole_checkpoint, name: changed})
    if changed != whole_checkpoint[name]:
        with pytest.raises(UserError):
            verify_files(accepts_checkpoint.folder)


@cases(200)
@given(st.data())
def test_checkpoints_that_were_made_to_harm(
    accepts_checkpoint, whole_checkpoint: dict[str, bytes], data: st.DataObject
) -> None:
    """Whose manifest says what their files are."""
    files: dict[str, bytes] = dict(whole_checkpoint)
    name = data.draw(st.sampled_from(["meta.json", "rank_00000.safetensors", "manifest.json", "class_names.txt"]))
    if name.endswith(".json"):
        content = json.loads(files[name])
        places = [content, *(value for value in content.values() if isinstance(value, dict))]
        inside = data.draw(st.sampled_from(places))
        key = data.draw(st.sampled_from(sorted(inside)))
        inside[key] = data.draw(json_values)
        files[name] = json.dumps(content).encode()
    else:
        files[name] = damaged(files[name], data.draw)
    if name != "manifest.json":
        manifest = json.loads(files["manifest.json"])
        manifest["files"][name] = {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        files["manifest.json"] = json.dumps(manifest).encode()
    accepts_checkpoint(files)

"""Checkpoints: content, retention, damage, resuming, failed writes, locks, and gradients that aren't finite."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import event_names, metrics
from helpers.small import ROOT, read_state
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vit_static.checkpoint import writer
from vit_static.checkpoint.folder import checkpoint_dir, numbered_checkpoints, read_manifest
from vit_static.checkpoint.progress import Progress
from vit_static.checkpoint.resume import read_progress, verify_files
from vit_static.common.errors import ConfigError, RunFailed, WeightsError
from vit_static.config.schema import Config
from vit_static.data.mixup import Mixup
from vit_static.train import run_dir, start_point
from vit_static.train.trainer import train
from vit_static.weights.source import load_weights

pytestmark = pytest.mark.reliability


def changed(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def steps_of(config: Config) -> list[int]:
    return [step for step, _ in numbered_checkpoints(config.run_dir / "checkpoints")]


# Content and retention


def test_a_checkpoint_holds_everything_that_a_resume_needs(config: Config) -> None:
    train(changed(config, "optim", ema_decay=0.9))
    last = checkpoint_dir(config.run_dir, 11)
    manifest = verify_files(last)
    assert {path.name for path in last.iterdir()} == {*manifest.files, "manifest.json"}
    state = load_file(last / "rank_00000.safetensors")
    weights = read_state(config.run_dir / "model.pdparams")
    suffixes = {"", "@moment1", "@moment2", "@beta1_pow_acc", "@beta2_pow_acc", "@ema"}
    assert {name.removeprefix("head.weight") for name in state if name.startswith("head.weight")} == suffixes
    assert np.array_equal(state["head.weight"], weights["head.weight"])
    assert {array.dtype for array in state.values()} == {np.dtype("float32")}
    meta = json.loads((last / "meta.json").read_text())
    assert meta["progress"]["step"] == 11 and meta["epoch"] == pytest.approx(11 * 16 / 120)
    assert meta["progress"]["best_value"] == max(line["ema_top1"] for line in metrics(config.run_dir, "eval"))
    assert meta["data"]["position"] == 11 * 16 and meta["data"]["num_images"] == 120
    assert {"vit_static", "paddle"} <= meta["versions"].keys() and meta["mesh"]["dp"] == 1
    assert manifest.run_id == read_manifest(checkpoint_dir(config.run_dir, 4)).run_id


def test_the_cost_of_writing_is_logged(finished: Config) -> None:
    written = [event for event in metrics(finished.run_dir, "event") if event["event"] == "checkpoint"]
    assert [event["step"] for event in written] == [4, 8, 11]
    shard = checkpoint_dir(finished.run_dir, 11) / "rank_00000.safetensors"
    assert all(event["seconds_waited"] >= 0.0 and event["seconds_written"] > 0.0 for event in written)
    assert written[-1]["bytes"] == shard.stat().st_size


def test_keep_every_is_never_removed(config: Config) -> None:
    train(changed(config, "checkpoint", every_steps=1, keep_last=2, keep_every=4))
    best = (config.run_dir / "checkpoints" / "best").resolve().name
    assert {f"step_{step:08d}" for step in steps_of(config)} == {
        *(f"step_{step:08d}" for step in (4, 8, 10, 11)), best,
    }  # fmt: skip


# Damage


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_another_runs(path: Path) -> None:
    """Replace a shard by one of the same content and size with another run's id."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "run_id": "0" * len(metadata["run_id"])})


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped bit of the weights": ("rank_00000.safetensors", flip_bit, "damaged"),
    "a flipped bit of the progress": ("meta.json", flip_bit, "damaged"),
    "a flipped bit of the config": ("config.yaml", flip_bit, "damaged"),
    "a truncated shard": ("rank_00000.safetensors", truncate, "is damaged: it has"),
    "a missing shard": ("rank_00000.safetensors", Path.unlink, "is missing"),
    "a missing manifest": ("manifest.json", Path.unlink, "an incomplete checkpoint"),
    "a truncated manifest": ("manifest.json", truncate, "damaged"),
    "another run's shard": (
        "rank_00000.safetensors",
        replace_by_another_runs,
        "belongs to a checkpoint of another run",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_an_intact_one_suggested(
    run: Config, damage: str, tally: Callable[..., None]
) -> None:
    name, spoil, expected = DAMAGES[damage]
    spoil(checkpoint_dir(run.run_dir, 11) / name)
    with pytest.raises(WeightsError) as error:
        train(run)
    message = str(error.value)
    assert "step_00000011" in message and expected in message and "\n" not in message
    assert f"--resume {checkpoint_dir(run.run_dir, 8)}" in message
    with pytest.raises(WeightsError, match="step_00000008"):
        load_weights(run.run_dir / "checkpoints" / "latest")
    tally("faults: damaged checkpoints")
    tally("faults: damaged checkpoints", 1, "survived")


def test_without_an_intact_checkpoint_the_message_says_so(run: Config) -> None:
    for step in (4, 8, 11):
        flip_bit(checkpoint_dir(run.run_dir, step) / "rank_00000.safetensors")
    with pytest.raises(WeightsError, match=r"no intact checkpoint before it.* --resume never"):
        train(run)


# Other formats


def write_format_3(folder: Path) -> None:
    """Write a checkpoint as version 0.1.0 did before format 4: the same files with other names in them."""
    folder.mkdir(parents=True)
    slices = {"head.bias": [[0], [10]]}
    header = {"run": "5d5be9c8d1e73edc", "step": "10", "rank": "0", "places": json.dumps(slices)}
    save_file({"head.bias": np.zeros(10, np.float32)}, folder / "rank_00000.safetensors", header)
    (folder / "config.yaml").write_text("name: old\naugment: {repeats: 1}\neval: {crop_ratio: 0.875}\n")
    (folder / "class_names.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    progress = {"step": 10, "evaluated_step": 10, "best_top1": 18.87, "best_step": 10, "left_out": []}
    data = {"position": 160, "num_images": 120, "images": "8c97caf41d66ea429bbb4c4d72a76835", "seed": 5, "repeats": 1}
    meta = {"format": 3, "progress": progress, "epoch": 1.33, "learning_rate": 0.0015, "data": data}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    manifest = {"format": 3, "run": "5d5be9c8d1e73edc", "step": 10, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


OTHER_FORMAT = (
    r"step_00000010: is a checkpoint of format {}, and this version reads format 4; resume with the version that wrote "
    r"it, or start a new run from its weights: copy model\.pdparams .* -o init\.from=PATH"
)


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_checkpoint_of_format_3_is_refused_with_the_remedy(config: Config, tmp_path: Path, resume: str) -> None:
    path = checkpoint_dir(config.run_dir if resume == "auto" else tmp_path / "other", 10)
    write_format_3(path)
    with pytest.raises(WeightsError, match=OTHER_FORMAT.format(3)) as error:
        train(config, resume="auto" if resume == "auto" else str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(WeightsError, match=OTHER_FORMAT.format(3)):
        load_weights(path)


def test_a_checkpoint_without_a_manifest_gives_the_format_of_its_metadata(config: Config) -> None:
    """As format 2 was: it had no manifest."""
    path = checkpoint_dir(config.run_dir, 10)
    path.mkdir(parents=True)
    (path / "meta.json").write_text('{"format": 2, "progress": {"step": 10}}')
    with pytest.raises(WeightsError, match=OTHER_FORMAT.format(2)):
        train(config)


# Resuming


def test_a_run_can_go_back_to_an_earlier_checkpoint(run: Config) -> None:
    """It gives the same bits, and the later checkpoints are archived."""
    expected = read_state(run.run_dir / "model.pdparams")
    merged = {path.name for path in run.run_dir.glob("*.pdparams")}  # model_best.pdparams, if step 8 is the best
    assert train(run, resume=str(checkpoint_dir(run.run_dir, 4)))
    assert steps_of(run) == [4, 8, 11]
    assert (run.run_dir / "checkpoints" / "latest").resolve().name == "step_00000011"
    archived = run.run_dir / "checkpoints_before_1"
    assert {path.name for path in archived.iterdir()} == {"step_00000008", "step_00000011", *merged}
    again = read_state(run.run_dir / "model.pdparams")
    assert all(np.array_equal(again[name], expected[name]) for name in expected)


def test_a_run_can_resume_from_another_runs_checkpoint(run: Config) -> None:
    other = run.model_copy(update={"name": "other"})
    assert train(other, resume=str(run.run_dir / "checkpoints" / "step_00000008"))
    state, expected = read_state(other.run_dir / "model.pdparams"), read_state(run.run_dir / "model.pdparams")
    assert all(np.array_equal(state[name], expected[name]) for name in expected)
    assert steps_of(run) == [4, 8, 11] and steps_of(other) == [11]
    run_ids = {read_manifest(checkpoint_dir(each.run_dir, 11)).run_id for each in (run, other)}
    assert len(run_ids) == 2


def test_resuming_from_anything_else_is_an_error(run: Config, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, run.run_dir / "model.pdparams"):
        with pytest.raises(WeightsError, match="--resume"):
            train(run, resume=str(path))


def test_all_forbidden_changes_are_named_at_once(run: Config) -> None:
    other = changed(changed(run, "model", depth=3), "optim", name="sgd")
    with pytest.raises(ConfigError, match=r"model.depth = 3 \(it was 1\).*optim.name = 'sgd' \(it was 'adamw'\)"):
        train(other)


# Failed writes


@pytest.fixture
def failing(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[Config], None], Callable[[Config], None], int], None]:
    """failing(spoil, mend, 2): call `spoil` before the second checkpoint of a process is written, and `mend` after."""

    def arrange(spoil: Callable[[Config], None], mend: Callable[[Config], None], failing_number: int) -> None:
        write, number = writer.CheckpointWriter._write, 0

        def write_hindered(self: writer.CheckpointWriter, *arguments: object) -> None:
            nonlocal number
            number += 1
            if number == failing_number:
                spoil(self._config)
            write(self, *arguments)
            if number == failing_number:
                mend(self._config)

        monkeypatch.setattr(writer.CheckpointWriter, "_write", write_hindered)

    return arrange


def fill_disk(config: Config) -> None:
    """Set the kernel's limit for the size of a file: writing beyond it fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def empty_disk(config: Config) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def remove_folder(config: Config) -> None:
    (config.run_dir / "checkpoints").rename(config.run_dir / "away")


def restore_folder(config: Config) -> None:
    (config.run_dir / "away").rename(config.run_dir / "checkpoints")


def block_folder(config: Config) -> None:
    """Put a file where the folder of checkpoints should be."""
    (config.run_dir / "checkpoints").rename(config.run_dir / "away")
    (config.run_dir / "checkpoints").write_text("")


def unblock_folder(config: Config) -> None:
    (config.run_dir / "checkpoints").unlink()
    (config.run_dir / "away").rename(config.run_dir / "checkpoints")


def without_best(config: Config) -> Config:
    """Evaluate at the end alone: no other checkpoints than the regular ones are written, those of the best results."""
    return changed(config, "eval", every_epochs=100.0)


FAILURES = {
    "a full disk": (fill_disk, empty_disk, "rank_00000.safetensors", "File too large"),
    "a folder that vanishes": (remove_folder, restore_folder, "checkpoints", "No such file or directory"),
    "a file in the way": (block_folder, unblock_folder, "checkpoints", "Not a directory"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_training_continues_after_a_failed_write(
    run: Config,
    failing: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
    failure: str,
    tally: Callable[..., None],
) -> None:
    spoil, mend, name, reason = FAILURES[failure]
    failing(spoil, mend, 2)
    longer = without_best(changed(changed(run, "train", epochs=3.0), "checkpoint", every_steps=4))
    assert train(longer)
    (message,) = [line for line in capfd.readouterr().out.splitlines() if "could not be written" in line]
    assert "step 16" in message and name in message and reason in message
    assert ("bytes were to be written" in message) == (failure == "a full disk")
    assert steps_of(longer) == [4, 8, 11, 12, 20, 22]
    assert not list((longer.run_dir / "checkpoints").glob(".*"))
    for step in steps_of(longer):
        verify_files(checkpoint_dir(longer.run_dir, step))
    missing = [event for event in metrics(longer.run_dir, "event") if event["event"] == "no checkpoint"]
    assert [event["step"] for event in missing] == [16]
    tally(f"faults: {failure}")
    tally(f"faults: {failure}", 1, "survived")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_can_stop_after_a_failed_write(run: Config, failing: Callable[..., None], failure: str) -> None:
    """Earlier checkpoints stay intact, and it resumes from them."""
    spoil, mend, name, reason = FAILURES[failure]
    failing(spoil, mend, 2)
    longer = without_best(changed(changed(run, "train", epochs=3.0), "checkpoint", every_steps=4, on_failure="stop"))
    with pytest.raises(RunFailed, match=f"{name}.*{reason}.*resumes from.*step_00000012"):
        train(longer)
    assert steps_of(longer) == [4, 8, 11, 12] and event_names(longer.run_dir)[-1] == "not saved"
    assert train(longer)


def test_a_failed_last_write_is_an_error(run: Config, failing: Callable[..., None]) -> None:
    """There is nothing to merge weights from."""
    failing(fill_disk, empty_disk, 1)
    with pytest.raises(RunFailed, match=r"Stopped at step 14; the same command resumes from .*step_00000011"):
        train(changed(changed(run, "train", max_steps=14, epochs=9.0), "checkpoint", every_steps=100))
    assert not (run.run_dir / "model.pdparams").exists()


# Locks


def test_a_folder_is_locked_against_a_second_run(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in it changes; the kernel releases the lock of a killed run."""
    monkeypatch.setattr(run_dir, "LOCK_WAIT_S", 0.1)
    before = {path: path.stat().st_mtime_ns for path in run.run_dir.rglob("*")}
    hold = (
        "import sys, time; from pathlib import Path; from vit_static.common.io import lock\n"
        "with lock(Path(sys.argv[1]), ''): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold, str(run.run_dir)], stdout=subprocess.PIPE, cwd=ROOT)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    longer = changed(run, "train", epochs=2.0)
    with pytest.raises(ConfigError, match="another run is using this folder"):
        train(longer)
    assert {path: path.stat().st_mtime_ns for path in run.run_dir.rglob("*")} == before
    other.kill()
    other.wait()
    assert train(longer)


def test_a_wrong_resume_leaves_no_folder(config: Config) -> None:
    with pytest.raises(WeightsError):
        train(config, resume="nowhere")
    assert not config.run_dir.parent.exists()


# Gradients that aren't finite


def poison_batches(monkeypatch: pytest.MonkeyPatch, batches: set[int]) -> None:
    """Put an infinite pixel into some batches of the training order, whichever step gets them."""
    mix = Mixup.__call__
    numbers: dict[int, int] = {}

    def poison(self: Mixup, batch: tuple[Any, ...], step: int) -> tuple[Any, Any]:
        images, labels = mix(self, batch, step)
        number = numbers.setdefault(hash(images.numpy().tobytes()), len(numbers))
        if number in batches:
            images = images.clone()
            images[0, 0, 0, 0] = float("inf")
        return images, labels

    monkeypatch.setattr(Mixup, "__call__", poison)


def test_a_run_stops_before_nonfinite_weights_overwrite_anything(
    config: Config, monkeypatch: pytest.MonkeyPatch, tally: Callable[..., None]
) -> None:
    """The check runs at each log step and before a checkpoint, and names the first such step."""
    poison_batches(monkeypatch, {6})
    with pytest.raises(RunFailed, match=r"gradients of step 7 are not finite.*resumes from.*step_00000004") as error:
        train(config)
    assert "\n" not in str(error.value)
    assert steps_of(config) == [4] and event_names(config.run_dir) == ["not finite"]
    assert not metrics(config.run_dir, "eval") and not (config.run_dir / "model.pdparams").exists()
    report = json.loads((config.run_dir / "nonfinite_step_00000007.json").read_text())
    assert report["step"] == 7 and report["batch"] == 6 and len(report["images"]) == 16
    assert report["lr"] == pytest.approx(0.5 * 1e-3 * (1 + np.cos(np.pi * 6 / 11)), rel=1e-6)
    assert report["grad_norms"].keys() == {
        "patch_embed", "cls_token", "pos_embed", "blocks.0", "norm", "head",
    }  # fmt: skip
    assert report["grad_norms"]["patch_embed"] in ("nan", "inf")
    assert all(Path(name).is_file() for name in report["images"])
    tally("faults: gradients that are not finite")
    tally("faults: gradients that are not finite", 1, "survived")


def test_a_run_rolls_back_and_skips_the_batch(
    config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tally: Callable[..., None]
) -> None:
    """It gives the bits of a run that never had the batch, also if it is interrupted and resumed."""
    poison_batches(monkeypatch, {6})
    recovering = changed(config, "train", on_nonfinite="rollback")
    assert train(recovering)
    assert "without that batch (rollback 1 of at most 3)" in capfd.readouterr().out
    assert event_names(config.run_dir) == ["rolled back", "finished"]
    progress, position = read_progress(checkpoint_dir(config.run_dir, 11))
    assert progress.skipped_batches == (6,) and position.position == 12 * 16
    expected = read_state(config.run_dir / "model.pdparams")
    monkeypatch.undo()
    without = recovering.model_copy(update={"name": "without"})
    monkeypatch.setattr(start_point, "Progress", partial(Progress, skipped_batches=(6,)))
    assert train(without)
    state = read_state(without.run_dir / "model.pdparams")
    assert all(np.array_equal(state[name], expected[name]) for name in expected)
    monkeypatch.undo()
    shutil.rmtree(checkpoint_dir(config.run_dir, 11))
    (config.run_dir / "model.pdparams").unlink()
    assert train(recovering)
    resumed = read_state(config.run_dir / "model.pdparams")
    assert all(np.array_equal(resumed[name], expected[name]) for name in expected)
    tally("faults: gradients that are not finite")
    tally("faults: gradients that are not finite", 1, "survived")


def test_the_number_of_rollbacks_is_limited(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_batches(monkeypatch, {5, 7, 8, 9, 10, 11, 12, 13, 14, 15})
    recovering = changed(config, "train", on_nonfinite="rollback", max_rollbacks=2)
    with pytest.raises(RunFailed, match="are not finite"):
        train(recovering)
    assert event_names(config.run_dir) == ["rolled back", "rolled back", "not finite"]


def test_without_a_checkpoint_a_rollback_is_an_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_batches(monkeypatch, {1})
    with pytest.raises(RunFailed, match="it has no checkpoint"):
        train(changed(config, "train", on_nonfinite="rollback"))

"""Checkpoints: what is in them, which are kept, what a damaged one is told apart by, and writing that fails."""

from __future__ import annotations

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
from helpers.runs import happened, metrics
from helpers.small import ROOT, read_state
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vit_static.checkpoint import writer
from vit_static.checkpoint.folder import _numbered_checkpoints, checkpoint_dir, read_manifest
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
    return [step for step, _ in sorted(_numbered_checkpoints(config.run_dir / "checkpoints"))]


# What is in one


def test_a_checkpoint_holds_all_that_a_run_needs(config: Config) -> None:
    train(changed(config, "optim", ema_decay=0.9))
    last = checkpoint_dir(config.run_dir, 11)
    manifest = verify_files(last)
    assert {path.name for path in last.iterdir()} == {*manifest.files, "manifest.json"}
    state = load_file(last / "rank_00000.safetensors")
    weights = read_state(config.run_dir / "model.pdparams")
    kept = {"", "@moment1", "@moment2", "@beta1_pow_acc", "@beta2_pow_acc", "@ema"}
    assert {name.removeprefix("head.weight") for name in state if name.startswith("head.weight")} == kept
    assert np.array_equal(state["head.weight"], weights["head.weight"])
    assert {array.dtype for array in state.values()} == {np.dtype("float32")}
    meta = json.loads((last / "meta.json").read_text())
    assert meta["progress"]["step"] == 11 and meta["epoch"] == pytest.approx(11 * 16 / 120)
    assert meta["progress"]["best_top1"] == max(line["ema_top1"] for line in metrics(config.run_dir, "eval"))
    assert meta["data"]["position"] == 11 * 16 and meta["data"]["num_images"] == 120
    assert {"vit_static", "paddle"} <= meta["versions"].keys() and meta["mesh"]["dp"] == 1
    assert manifest.run == read_manifest(checkpoint_dir(config.run_dir, 4)).run


def test_what_writing_costs_is_logged(finished: Config) -> None:
    written = [event for event in metrics(finished.run_dir, "event") if event["event"] == "checkpoint"]
    assert [event["step"] for event in written] == [4, 8, 11]
    part = checkpoint_dir(finished.run_dir, 11) / "rank_00000.safetensors"
    assert all(event["seconds_waited"] >= 0.0 and event["seconds_written"] > 0.0 for event in written)
    assert written[-1]["bytes"] == part.stat().st_size


def test_those_of_every_so_many_steps_are_kept(config: Config) -> None:
    train(changed(config, "checkpoint", every_steps=1, keep_last=2, keep_every=4))
    best = (config.run_dir / "checkpoints" / "best").resolve().name
    assert {f"step_{step:08d}" for step in steps_of(config)} == {
        *(f"step_{step:08d}" for step in (4, 8, 10, 11)), best,
    }  # fmt: skip


# Found damaged


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def take_from_another_run(path: Path) -> None:
    """A part like this one, of the same size, that bears another run's number."""
    with safe_open(path, "numpy") as file:
        about = file.metadata()
    save_file(load_file(path), path, {**about, "run": "0" * len(about["run"])})


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped bit of the weights": ("rank_00000.safetensors", flip, "damaged"),
    "a flipped bit of the place": ("meta.json", flip, "damaged"),
    "a flipped bit of the config": ("config.yaml", flip, "damaged"),
    "a truncated part": ("rank_00000.safetensors", truncate, "bytes, and was written with"),
    "a missing part": ("rank_00000.safetensors", Path.unlink, "is missing"),
    "a missing manifest": ("manifest.json", Path.unlink, "not a whole checkpoint"),
    "a truncated manifest": ("manifest.json", truncate, "damaged"),
    "another run's part": ("rank_00000.safetensors", take_from_another_run, "a part of another run"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_a_whole_one_offered(
    run: Config, damage: str, tally: Callable[..., None]
) -> None:
    name, spoil, words = DAMAGES[damage]
    spoil(checkpoint_dir(run.run_dir, 11) / name)
    with pytest.raises(WeightsError) as error:
        train(run)
    said = str(error.value)
    assert "step_00000011" in said and words in said and "\n" not in said
    assert f"--resume {checkpoint_dir(run.run_dir, 8)}" in said
    with pytest.raises(WeightsError, match="step_00000008"):
        load_weights(run.run_dir / "checkpoints" / "latest")
    tally("faults: damaged checkpoints")
    tally("faults: damaged checkpoints", 1, "survived")


def test_where_none_is_whole_that_is_said(run: Config) -> None:
    for step in (4, 8, 11):
        flip(checkpoint_dir(run.run_dir, step) / "rank_00000.safetensors")
    with pytest.raises(WeightsError, match=r"no whole one before it.* --resume never"):
        train(run)


def test_an_older_versions_checkpoint_is_told_apart(run: Config) -> None:
    for step in (4, 8, 11):
        path = checkpoint_dir(run.run_dir, step)
        (path / "manifest.json").unlink()
        (path / "meta.json").write_text('{"format": 2, "progress": {"step": 11}}')
    with pytest.raises(WeightsError, match=r"is of format 2.*init.from"):
        train(run)


# Where to go on from


def test_a_run_can_go_back_to_an_earlier_checkpoint(run: Config) -> None:
    """To the same bits; what came later is out of the way, and kept."""
    expected = read_state(run.run_dir / "model.pdparams")
    assert train(run, resume=str(checkpoint_dir(run.run_dir, 4)))
    assert steps_of(run) == [4, 8, 11]
    assert (run.run_dir / "checkpoints" / "latest").resolve().name == "step_00000011"
    aside = run.run_dir / "checkpoints_before_1"
    assert {path.name for path in aside.iterdir()} == {"step_00000008", "step_00000011", "model.pdparams"}
    again = read_state(run.run_dir / "model.pdparams")
    assert all(np.array_equal(again[name], expected[name]) for name in expected)


def test_another_runs_checkpoint_can_be_gone_on_from(run: Config, tmp_path: Path) -> None:
    other = run.model_copy(update={"name": "other"})
    assert train(other, resume=str(run.run_dir / "checkpoints" / "step_00000008"))
    mine, theirs = read_state(other.run_dir / "model.pdparams"), read_state(run.run_dir / "model.pdparams")
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert steps_of(run) == [4, 8, 11] and steps_of(other) == [11]
    runs = {read_manifest(checkpoint_dir(each.run_dir, 11)).run for each in (run, other)}
    assert len(runs) == 2


def test_what_is_no_checkpoint_cannot_be_gone_on_from(run: Config, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, run.run_dir / "model.pdparams"):
        with pytest.raises(WeightsError, match="--resume"):
            train(run, resume=str(path))


def test_all_that_has_changed_and_may_not_is_told_at_once(run: Config) -> None:
    other = changed(changed(run, "model", depth=3), "optim", name="sgd")
    with pytest.raises(ConfigError, match=r"model.depth = 3 \(it was 2\).*optim.name = 'sgd' \(it was 'adamw'\)"):
        train(other)


# Writing that fails


@pytest.fixture
def failing(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[Config], None], Callable[[Config], None], int], None]:
    """failing(spoil, mend, 2): while a process's second checkpoint is written, what `spoil` does holds."""

    def arrange(spoil: Callable[[Config], None], mend: Callable[[Config], None], which: int) -> None:
        write, num_written = writer.CheckpointWriter._write, 0

        def write_hindered(self: writer.CheckpointWriter, *arguments: object) -> None:
            nonlocal num_written
            num_written += 1
            if num_written == which:
                spoil(self._config)
            write(self, *arguments)
            if num_written == which:
                mend(self._config)

        monkeypatch.setattr(writer.CheckpointWriter, "_write", write_hindered)

    return arrange


def fill_disk(config: Config) -> None:
    """The kernel's limit to the size of a file: writing beyond it fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def empty_disk(config: Config) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def take_folder_away(config: Config) -> None:
    (config.run_dir / "checkpoints").rename(config.run_dir / "away")


def bring_folder_back(config: Config) -> None:
    (config.run_dir / "away").rename(config.run_dir / "checkpoints")


def occupy_name(config: Config) -> None:
    """A file that stands where the next checkpoint's folder is to be made, in the way of all."""
    (config.run_dir / "checkpoints").rename(config.run_dir / "away")
    (config.run_dir / "checkpoints").write_text("")


def clear_name(config: Config) -> None:
    (config.run_dir / "checkpoints").unlink()
    (config.run_dir / "away").rename(config.run_dir / "checkpoints")


FAILURES = {
    "a full disk": (fill_disk, empty_disk, "rank_00000.safetensors", "File too large"),
    "a folder that vanishes": (take_folder_away, bring_folder_back, "checkpoints", "No such file or directory"),
    "a file in the way": (occupy_name, clear_name, "checkpoints", "Not a directory"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_training_goes_on_where_a_checkpoint_cannot_be_written(
    run: Config,
    failing: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
    failure: str,
    tally: Callable[..., None],
) -> None:
    spoil, mend, name, why = FAILURES[failure]
    failing(spoil, mend, 2)
    longer = changed(changed(run, "train", epochs=3.0), "checkpoint", every_steps=4)
    assert train(longer)
    (said,) = [line for line in capfd.readouterr().out.splitlines() if "could not be written" in line]
    assert "step 16" in said and name in said and why in said
    assert ("bytes were to be written" in said) == (failure == "a full disk")
    assert steps_of(longer) == [4, 8, 11, 12, 20, 22]
    assert not list((longer.run_dir / "checkpoints").glob(".*"))
    for step in steps_of(longer):
        verify_files(checkpoint_dir(longer.run_dir, step))
    missing = [event for event in metrics(longer.run_dir, "event") if event["event"] == "no checkpoint"]
    assert [event["step"] for event in missing] == [16]
    tally(f"faults: {failure}")
    tally(f"faults: {failure}", 1, "survived")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_stops_where_that_is_asked_for(run: Config, failing: Callable[..., None], failure: str) -> None:
    """With what it had before whole, from which it goes on to the same bits."""
    spoil, mend, name, why = FAILURES[failure]
    failing(spoil, mend, 2)
    longer = changed(changed(run, "train", epochs=3.0), "checkpoint", every_steps=4, on_failure="stop")
    with pytest.raises(RunFailed, match=f"{name}.*{why}.*resumes from.*step_00000012"):
        train(longer)
    assert steps_of(longer) == [4, 8, 11, 12] and happened(longer.run_dir)[-1] == "not saved"
    assert train(longer)


def test_the_last_one_failing_is_told(run: Config, failing: Callable[..., None]) -> None:
    """There would be nothing to merge weights from."""
    failing(fill_disk, empty_disk, 1)
    with pytest.raises(RunFailed, match=r"Stopped at step 14; the same command resumes from .*step_00000011"):
        train(changed(changed(run, "train", max_steps=14, epochs=9.0), "checkpoint", every_steps=100))
    assert not (run.run_dir / "model.pdparams").exists()


# Two runs


def test_a_folder_is_one_runs(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in it changes; a lock that a killed run leaves is the kernel's, which forgets it."""
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


def test_a_mistake_leaves_no_folder(config: Config) -> None:
    with pytest.raises(WeightsError):
        train(config, resume="nowhere")
    assert not config.run_dir.parent.exists()


# Gradients that aren't finite


def poisoned(monkeypatch: pytest.MonkeyPatch, batches: set[int]) -> None:
    """Some batches of the order give an infinite pixel, whichever step gets them."""
    mix = Mixup.__call__
    names: dict[int, int] = {}

    def poison(self: Mixup, batch: tuple[Any, ...], step: int) -> tuple[Any, Any]:
        images, labels = mix(self, batch, step)
        number = names.setdefault(hash(images.numpy().tobytes()), len(names))
        if number in batches:
            images = images.clone()
            images[0, 0, 0, 0] = float("inf")
        return images, labels

    monkeypatch.setattr(Mixup, "__call__", poison)


def test_a_run_stops_before_unsound_weights_overwrite_anything(
    config: Config, monkeypatch: pytest.MonkeyPatch, tally: Callable[..., None]
) -> None:
    """Found at the next log step, or before a checkpoint, and the first of the steps is named."""
    poisoned(monkeypatch, {6})
    with pytest.raises(RunFailed, match=r"gradients of step 7 are not finite.*resumes from.*step_00000004") as error:
        train(config)
    assert "\n" not in str(error.value)
    assert steps_of(config) == [4] and happened(config.run_dir) == ["not finite"]
    assert not metrics(config.run_dir, "eval") and not (config.run_dir / "model.pdparams").exists()
    account = json.loads((config.run_dir / "nonfinite_step_00000007.json").read_text())
    assert account["step"] == 7 and account["batch"] == 6 and len(account["images"]) == 16
    assert account["lr"] == pytest.approx(0.5 * 1e-3 * (1 + np.cos(np.pi * 6 / 11)), rel=1e-6)
    assert account["grad_norms"].keys() == {
        "patch_embed", "cls_token", "pos_embed", "blocks.0", "blocks.1", "norm", "head",
    }  # fmt: skip
    assert account["grad_norms"]["patch_embed"] in ("nan", "inf")
    assert all(Path(name).is_file() for name in account["images"])
    tally("faults: gradients that are not finite")
    tally("faults: gradients that are not finite", 1, "survived")


def test_a_run_rolls_back_and_leaves_the_batch_out(
    config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tally: Callable[..., None]
) -> None:
    """To the bits of a run that never had the batch, also when it is stopped and goes on later."""
    poisoned(monkeypatch, {6})
    healing = changed(config, "train", on_nonfinite="rollback")
    assert train(healing)
    assert "without that batch (rollback 1 of at most 3)" in capfd.readouterr().out
    assert happened(config.run_dir) == ["rolled back", "finished"]
    progress, position = read_progress(checkpoint_dir(config.run_dir, 11))
    assert progress.skipped_batches == (6,) and position.position == 12 * 16
    expected = read_state(config.run_dir / "model.pdparams")
    monkeypatch.undo()
    without = healing.model_copy(update={"name": "without"})
    monkeypatch.setattr(start_point, "Progress", partial(Progress, skipped_batches=(6,)))
    assert train(without)
    again = read_state(without.run_dir / "model.pdparams")
    assert all(np.array_equal(again[name], expected[name]) for name in expected)
    monkeypatch.undo()
    shutil.rmtree(checkpoint_dir(config.run_dir, 11))
    (config.run_dir / "model.pdparams").unlink()
    assert train(healing)
    resumed = read_state(config.run_dir / "model.pdparams")
    assert all(np.array_equal(resumed[name], expected[name]) for name in expected)
    tally("faults: gradients that are not finite")
    tally("faults: gradients that are not finite", 1, "survived")


def test_rolling_back_has_an_end(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, {5, 7, 8, 9, 10, 11, 12, 13, 14, 15})
    healing = changed(config, "train", on_nonfinite="rollback", max_rollbacks=2)
    with pytest.raises(RunFailed, match="are not finite"):
        train(healing)
    assert happened(config.run_dir) == ["rolled back", "rolled back", "not finite"]


def test_without_a_checkpoint_there_is_nowhere_to_go_back_to(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, {1})
    with pytest.raises(RunFailed, match="it has no checkpoint"):
        train(changed(config, "train", on_nonfinite="rollback"))

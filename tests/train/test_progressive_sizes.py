"""Whole runs on images of several sizes (train.image_sizes): log, resume at the border, evaluation at several sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.forked_verbs import run_verb
from helpers.runs import TINY, metrics
from helpers.small import read_state
from helpers.tiny import tiny_model

from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.model.draws import at_size
from vit_static.model.flops import train_flops
from vit_static.model.variants import shape_of
from vit_static.train.trainer import train

# 11 steps: 8 x 16 pixels until step 4, which is saved, 16 x 16 until step 9, and 8 x 8
SIZES = [([8, 16], 0.4), ([16, 16], 0.8), ([8, 8], 1.0)]
PHASES = {0: [8, 16], 4: [16, 16], 9: [8, 8]}


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Config:
    """Return the config of a finished run, whose folder the tests must not change."""
    folder = tmp_path_factory.mktemp("sized")
    (folder / "tiny.yaml").write_text(TINY)
    overrides = [f"data.root={small_digits}", f"output_dir={folder}", "name=sized"]
    overrides += [f"train.image_sizes={json.dumps(SIZES)}", "augment.random_erasing_probability=0.5"]
    overrides += ["optim.ema_decay=0.9", "augment.mixup_alpha=0.8", "checkpoint.every_steps=2"]
    config = load_config(folder / "tiny.yaml", overrides)
    assert train(config)
    return config


def test_the_log_says_where_the_size_changes(sized: Config) -> None:
    """With the operations of an image of this size, and the time to compile its program."""
    events = [event for event in metrics(sized.run_dir, "event") if event["event"] == "image size"]
    assert {event["step"]: event["image_size"] for event in events} == PHASES
    for event in events:
        model = at_size(sized.model, tuple(event["image_size"]))
        assert event["train_flops_per_image"] == train_flops(shape_of(model))
        assert event["compile_seconds"] > 0.0
    report = (sized.run_dir / "report.html").read_text()
    assert "images of 16x16" in report and "images of 8x8" in report


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_resumes_in_a_phase_and_at_its_border_with_the_same_bits(
    sized: Config, tmp_path: Path, step: int
) -> None:
    """As after a kill behind this checkpoint: with erasing, mixup, dropout and a moving average."""
    shutil.copytree(sized.run_dir, tmp_path / "again", symlinks=True)
    run = sized.model_copy(update={"output_dir": str(tmp_path), "name": "again"})
    for later in (tmp_path / "again" / "checkpoints").iterdir():
        if later.name.startswith("step_") and int(later.name[5:]) > step:
            shutil.rmtree(later)
    (tmp_path / "again" / "checkpoints" / "latest").unlink()
    (tmp_path / "again" / "checkpoints" / "latest").symlink_to(f"step_{step:08d}")
    (tmp_path / "again" / "checkpoints" / "best").unlink(missing_ok=True)
    assert train(run)
    events = metrics(run.run_dir, "event")
    resumed = next(number for number, event in enumerate(events) if event["event"] == "resumed")
    changes = {event["step"]: event["image_size"] for event in events[resumed:] if event["event"] == "image size"}
    assert changes == {start: size for start, size in PHASES.items() if start >= step}
    for name in ("model.pdparams", "model_ema.pdparams"):
        again, expected = read_state(run.run_dir / name), read_state(sized.run_dir / name)
        assert all(np.array_equal(again[key], value) for key, value in expected.items())


def test_several_sizes_are_evaluated_in_one_call(sized: Config, tmp_path: Path) -> None:
    """Each as by itself, and the model's own as at the end of the run."""

    def evaluated(*arguments: str) -> Any:
        done = run_verb("eval", "--checkpoint", sized.run_dir, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        *lines, values = done.stdout.splitlines()
        return lines, json.loads(values)

    lines, values = evaluated("--image-size", "8x16", "--image-size", "16")
    assert [line.split("  ")[0] for line in lines[-2:]] == ["8x16", "16x16"]
    small, own = values["image_sizes"]
    assert small.pop("image_size") == [8, 16] and own.pop("image_size") == [16, 16]
    assert small["loss"] != own["loss"]
    at_end = metrics(sized.run_dir, "eval")[-1]
    assert own["loss"] == pytest.approx(at_end["loss"], rel=1e-6)
    assert evaluated("-o", "model.image_size=[8, 16]")[1] == small


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "12"], "--image-size: images of 12x12 can't be divided into patches of 8 pixels; set 16"),
        (["--image-size", "8", "--image-size", "16", "--per-class", "c.csv"], "--per-class: writes the classes of one"),
    ],
)
def test_an_evaluation_at_a_size_that_does_not_go_is_refused(
    sized: Config, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run_verb("eval", "--checkpoint", sized.run_dir, *arguments, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("[[16, 0.5]]", "sizes change after the shares [0.5] of the steps, which must increase from above 0 to 1.0"),
        ("[[8, 0.5], [16, 0.5], [8, 1.0]]", "sizes change after the shares [0.5, 0.5, 1.0] of the steps"),
        ("[[8, 0.0], [16, 1.0]]", "sizes change after the shares [0.0, 1.0] of the steps"),
        (
            "[[12, 0.5], [16, 1.0]]",
            "train.image_sizes: images of 12x12 can't be divided into patches of 8 pixels; set 16",
        ),
        ("[[8, 1.5]]", "must be at most 1"),
        (
            "[8, 16]",
            "-o train.image_sizes=[8, 16]: must be [[SIZE, UNTIL], ...], each with the share of the steps at which "
            "images of this size end, such as [[8, 0.5], [16, 1.0]]",
        ),
        ("[[8, 0.5], 16]", "such as [[128, 0.5], [224, 1.0]]"),
        ("large", "must be [[SIZE, UNTIL], ...]"),
    ],
)
def test_sizes_that_do_not_go_are_refused(tmp_path: Path, small_digits: Path, sizes: str, message: str) -> None:
    (tmp_path / "tiny.yaml").write_text(f"{tiny_model()}data: {{root: {small_digits}}}\n")
    overrides = ["-o", f"train.image_sizes={sizes}"]
    done = run_verb("pretrain", "-c", tmp_path / "tiny.yaml", *overrides, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr

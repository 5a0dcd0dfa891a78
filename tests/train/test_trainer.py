"""Whole runs in this process, on a small copy of the digits: the files they write, and how they resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import event_names, metrics
from helpers.small import read_state

from vit_static.checkpoint.folder import open_shards
from vit_static.common.errors import ConfigError, WeightsError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.report.run_log import latest_run, read_metrics
from vit_static.train.evaluate import evaluate_checkpoint
from vit_static.train.trainer import train
from vit_static.weights.source import load_weights


@pytest.mark.cpu_isa
def test_a_run_writes_the_files_of_the_contract(finished: Config) -> None:
    run = finished.run_dir
    # 120 images in batches of 16 for 1.5 epochs: 11 steps; evaluated after the first epoch (step 8) and at the end
    assert load_config(run / "config.yaml") == finished
    lines = metrics(run, "train")
    assert [line["step"] for line in lines] == [1, 3, 6, 9, 11]
    assert {"epoch", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "mfu", "memory_mb"} <= set(lines[0])
    assert all(50 < line["memory_mb"] < 50_000 for line in lines)
    assert all(0.0 <= line["data_wait"] <= 1.0 and line["images_per_s"] > 0 for line in lines)
    evaluations = metrics(run, "eval")
    assert [line["step"] for line in evaluations] == [8, 11]
    assert all(line["num_images"] == 30 for line in evaluations)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["best", "latest", "step_00000004", "step_00000008", "step_00000011"]
    assert (run / "checkpoints" / "latest").resolve().name == "step_00000011"
    assert list(run.glob("events.out.tfevents*")) and (run / "model.pdparams").is_file()
    state = read_state(run / "model.pdparams")
    assert {value.dtype for value in state.values()} == {np.dtype("float32")}
    merged = load_weights(run / "checkpoints" / "latest").state
    assert all(np.array_equal(merged[name], state[name]) for name in state)


def test_the_log_has_each_steps_learning_rate_and_epoch(finished: Config) -> None:
    for line in metrics(finished.run_dir, "train"):
        done_steps = line["step"] - 1
        assert line["lr"] == pytest.approx(0.5 * 1e-3 * (1 + np.cos(np.pi * done_steps / 11)), rel=1e-6)
        assert line["epoch"] == pytest.approx(line["step"] * 16 / 120, abs=1e-4)


@pytest.mark.cpu_isa
def test_a_resumed_run_ends_with_the_same_bits(run: Config) -> None:
    """From step 4, in the middle of the first epoch, with dropout, drop path, crops and flips."""
    folder = run.run_dir
    expected = read_state(folder / "model.pdparams")
    losses = {line["step"]: line["loss"] for line in metrics(folder, "train")}
    for later in ("step_00000008", "step_00000011"):
        shutil.rmtree(folder / "checkpoints" / later)
    (folder / "model.pdparams").unlink()
    assert train(run)
    again = read_state(folder / "model.pdparams")
    assert all(np.array_equal(again[name], expected[name]) for name in expected)
    assert event_names(folder) == ["finished", "resumed", "finished"]
    resumed = metrics(folder, "train")[5:]
    assert [line["step"] for line in resumed] == [6, 9, 11]
    # The first line's loss is that of one step, so it must be equal too.
    assert all(line["loss"] == losses[line["step"]] for line in resumed)


def test_a_finished_run_stays_unchanged_and_names_the_key_that_ends_it(
    run: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (run.run_dir / "model.pdparams").read_bytes()
    assert train(run)
    output = capfd.readouterr().out
    assert "this run has ended already, after 11 steps: set a larger train.epochs, or" in output
    assert "settings that differ" not in output
    assert (run.run_dir / "model.pdparams").read_bytes() == before


def test_never_resuming_starts_again(run: Config) -> None:
    shorter = run.model_copy(update={"train": run.train.model_copy(update={"max_steps": 6}), "seed": 9})
    assert train(shorter, resume="never")
    assert [line["step"] for line in metrics(run.run_dir, "train")] == [1, 3, 6, 9, 11, 1, 3, 6]
    merged = load_weights(run.run_dir / "checkpoints" / "step_00000006").state
    state = read_state(run.run_dir / "model.pdparams")
    assert all(np.array_equal(merged[name], state[name]) for name in state)
    assert (
        run.run_dir / "checkpoints_before_1" / "step_00000011"
    ).is_dir()  # the first run's checkpoints are still there
    lines = latest_run(read_metrics(run.run_dir / "metrics.jsonl"))
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 3, 6]


@pytest.mark.parametrize(
    ("override", "key"),
    [("model.depth=3", "model.depth"), ("seed=6", "seed"), ("optim.name=sgd", "optim.name")],
)
def test_a_run_does_not_resume_with_another_model_or_order(run: Config, override: str, key: str) -> None:
    changed = load_config(run.run_dir / "config.yaml", [f"output_dir={run.output_dir}", "name=copy", override])
    with pytest.raises(ConfigError, match=key) as error:
        train(changed)
    assert "\n" not in str(error.value) and "--resume never" in str(error.value)


def test_a_finished_run_resumes_for_more_epochs_and_says_what_differs(
    config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 4})}))
    capfd.readouterr()
    assert train(config)
    note = "note: settings that differ from those at the checkpoint: train.max_steps 4 -> null\n"
    assert note in capfd.readouterr().out
    assert (config.run_dir / "checkpoints" / "latest").resolve().name == "step_00000011"


def test_old_checkpoints_are_removed_but_not_the_best(config: Config) -> None:
    checkpoint = config.checkpoint.model_copy(update={"every_steps": 1, "keep_last": 2})
    train(config.model_copy(update={"checkpoint": checkpoint}))
    folder = config.run_dir / "checkpoints"
    names = {path.name for path in folder.glob("step_*")}
    assert {"step_00000010", "step_00000011", (folder / "best").resolve().name} == names
    best = max(metrics(config.run_dir, "eval"), key=lambda line: line["top1"])
    assert (folder / "best").resolve().name == f"step_{best['step']:08d}"


def test_a_half_written_line_of_a_killed_run_damages_no_other_line(config: Config) -> None:
    train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 4})}))
    path = config.run_dir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')
    train(config)
    entries = read_metrics(path)
    assert event_names(config.run_dir) == ["finished", "resumed", "finished"]
    assert len(entries) == len(path.read_text().splitlines()) - 1


def test_a_schedule_shorter_than_the_progress_ends_the_run(run: Config) -> None:
    """Its checkpoint may never have been evaluated."""
    for name in ("step_00000008", "step_00000011"):
        shutil.rmtree(run.run_dir / "checkpoints" / name)
    assert train(run.model_copy(update={"train": run.train.model_copy(update={"max_steps": 2})}))
    assert (run.run_dir / "model.pdparams").is_file()


def test_images_of_several_labels_train_and_are_evaluated(config: Config, tmp_path: Path) -> None:
    """Every digit also has class 10 or 11: even or odd."""
    root = Path(config.data.root)
    for split in ("train", "val"):
        lines = [
            f"{path} {path.parent.name},{10 + int(path.parent.name) % 2}\n"
            for path in sorted(root.glob(f"{split}/*/*"))
        ]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    several = load_config(
        tmp_path / "tiny.yaml",
        [f"data.root={tmp_path}", "data.train=train.txt", "data.val=val.txt", "data.multi_label=true",
         "loss.name=sigmoid", "model.num_classes=12", "model.head_bias_init=-2.0", f"output_dir={tmp_path}/output",
         "optim.lr=3e-3", "train.epochs=12"],
    )  # fmt: skip
    assert train(several)
    evaluations = metrics(several.run_dir, "eval")
    # Chance is 2 of 12; even or odd is soon learned, or at least which of the two is more frequent.
    assert evaluations[-1]["top1"] > 40 and evaluations[-1]["num_images"] == 30
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    errors = json.loads((several.run_dir / "evaluation.json").read_text())
    assert errors["num_correct"] == round(0.3 * evaluations[-1]["top1"]) and errors["confusions"] is None
    for image in errors["images"]:  # val.txt names them relative to its folder
        digit = int(Path(image["path"]).parent.name)
        assert image["labels"] == [digit, 10 + digit % 2] and image["predicted"] not in image["labels"]
    assert "Images may have several labels here" in (several.run_dir / "report.html").read_text()


def test_several_labels_with_softmax_and_odd_batches_with_mixup_are_refused(config: Config, tmp_path: Path) -> None:
    for overrides, expected in (
        (["data.multi_label=true"], "loss.name=sigmoid"),
        (["augment.mixup_alpha=0.2", "data.global_batch_size=15"], "data.global_batch_size = 15"),
    ):
        with pytest.raises(ConfigError, match=expected):
            load_config(tmp_path / "tiny.yaml", overrides)


def test_a_moving_average_is_evaluated_saved_and_resumed(config: Config, tmp_path: Path) -> None:
    """With the same bits, from a checkpoint in the middle of the run, and with another optimizer than AdamW."""
    with_ema = config.model_copy(
        update={
            "optim": config.optim.model_copy(update={"name": "lamb", "ema_decay": 0.5}),
            "output_dir": str(tmp_path / "with_ema"),
        }
    )
    assert train(with_ema)
    run = with_ema.run_dir
    for line in metrics(run, "eval"):
        assert {"ema_top1", "ema_top5", "ema_loss"} <= line.keys() and line["ema_loss"] != line["loss"]
    weights, average = read_state(run / "model.pdparams"), read_state(run / "model_ema.pdparams")
    assert weights.keys() == average.keys()
    assert not np.array_equal(weights["head.weight"], average["head.weight"])
    from_checkpoint = load_weights(run / "checkpoints" / "latest", ema=True).state
    assert all(np.array_equal(from_checkpoint[name], average[name]) for name in average)
    losses = metrics(run, "eval")
    for later in ("step_00000008", "step_00000011"):
        shutil.rmtree(run / "checkpoints" / later)
    for name in ("model.pdparams", "model_ema.pdparams"):
        (run / name).unlink()
    assert train(with_ema)
    again = read_state(run / "model_ema.pdparams")
    assert all(np.array_equal(again[name], average[name]) for name in average)
    assert metrics(run, "eval")[-1]["ema_loss"] == losses[-1]["ema_loss"]


def test_schedule_free_evaluates_and_keeps_its_average(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And resumes with the same bits, from a checkpoint in the middle of the warmup."""
    overrides = [f"output_dir={tmp_path / 'free'}", f"data.root={config.data.root}"]
    free = load_config(
        tmp_path / "tiny.yaml", [*overrides, "optim.name=schedule_free_adamw", "schedule.warmup_steps=6"]
    )
    assert train(free)
    run, latest = free.run_dir, free.run_dir / "checkpoints" / "latest"
    assert load_config(run / "config.yaml") == free and free.schedule.name == "constant"
    rates = [line["lr"] for line in metrics(run, "train")]  # of steps 1, 3, 6, 9 and 11
    np.testing.assert_allclose(rates, 1e-3 * np.array([1 / 6, 3 / 6, 1.0, 1.0, 1.0]))
    merged, shards = read_state(run / "model.pdparams"), open_shards(latest)
    trained, offset = shards.read("norm.weight"), shards.read("norm.weight@offset")
    assert np.abs(offset).min() > 0.0  # z - y
    expected = 0.9 * merged["norm.weight"] + 0.1 * (trained + offset)  # y = beta1 x + (1 - beta1) z
    np.testing.assert_allclose(trained, expected, rtol=1e-6)
    assert all(np.array_equal(value, merged[name]) for name, value in load_weights(latest).state.items())
    last = metrics(run, "eval")[-1]
    capsys.readouterr()
    evaluate_checkpoint(None, run, [])
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (evaluated["top1"], evaluated["loss"]) == pytest.approx((last["top1"], last["loss"]), rel=1e-5)
    for later in ("step_00000008", "step_00000011"):
        shutil.rmtree(run / "checkpoints" / later)
    assert train(free)
    again = read_state(run / "model.pdparams")
    assert all(np.array_equal(again[name], merged[name]) for name in merged)
    assert metrics(run, "eval")[-1]["loss"] == last["loss"]


def test_a_missing_moving_average_is_an_error(finished: Config) -> None:
    with pytest.raises(WeightsError, match="no moving average"):
        load_weights(finished.run_dir / "checkpoints" / "latest", ema=True)


def test_a_run_does_not_resume_with_another_optimizer(run: Config) -> None:
    for section, change in (
        ("optim", {"ema_decay": 0.9}),
        ("train", {"freeze": "backbone"}),
        ("optim", {"name": "lion"}),
    ):
        changed = run.model_copy(update={section: getattr(run, section).model_copy(update=change)})
        with pytest.raises(ConfigError, match=next(iter(change))):
            train(changed)

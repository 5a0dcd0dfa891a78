"""The best result, early stopping, and the files and lines of a run's end."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from helpers.runs import event_names, metrics
from helpers.small import read_state
from pydantic import TypeAdapter

from vit_static.checkpoint.progress import Progress
from vit_static.config.schema import Config
from vit_static.report.run_log import read_run
from vit_static.train.trainer import train
from vit_static.weights.source import load_weights


def evaluated(values: list[float], metric: str = "top1", min_delta: float = 0.0) -> Progress:
    """The progress after evaluations at steps 1, 2, 3, ..."""
    progress = Progress(0)
    for step, value in enumerate(values, 1):
        progress = Progress(**{**vars(progress), "step": step}).after_evaluation(metric, value, min_delta)
    return progress


def keras_wait(values: list[float], min_delta: float, sign: float) -> int:
    """`EarlyStopping.wait` of Keras 3, with `sign` = 1 for mode="max"."""
    best, wait = -sign * np.inf, 0
    for value in values:
        wait += 1
        if sign * (value - best) > min_delta:
            best, wait = value, 0
    return wait


@pytest.mark.parametrize("min_delta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("metric", ["top1", "loss"])
def test_evaluations_without_an_improvement_are_counted_as_keras_does(metric: str, min_delta: float) -> None:
    values = np.random.default_rng(1).integers(0, 12, size=(40, 12)) / 2.0
    sign = -1.0 if metric == "loss" else 1.0
    for row in values.tolist():
        progress = evaluated(row, metric, min_delta)
        assert progress.num_stale_evals == keras_wait(row, min_delta, sign)
        # The best checkpoint is the first of the best values, however small the improvement.
        assert progress.best_value == sign * max(sign * value for value in row)
        assert progress.best_step == 1 + row.index(progress.best_value) and progress.last_value == row[-1]


def test_small_improvements_add_up() -> None:
    """Compared with the last improvement that counted, not with the evaluation before."""
    assert evaluated([10.0, 10.4, 10.8, 11.2], min_delta=1.0).num_stale_evals == 0


def test_values_that_are_not_finite_improve_nothing() -> None:
    progress = evaluated([np.nan, 3.0, np.nan, -np.inf], "loss")
    assert progress.best_step == 2 and progress.num_stale_evals == 2 and progress.last_value is None
    assert evaluated([np.nan]).best_step is None


def test_another_metric_begins_again() -> None:
    progress = evaluated([90.0, 95.0])
    after = Progress(**{**vars(progress), "step": 3}).after_evaluation("loss", 7.0, 0.0)
    assert (after.metric, after.best_value, after.best_step, after.num_stale_evals) == ("loss", 7.0, 3, 0)


def test_the_best_top1_of_an_earlier_versions_checkpoint_is_read() -> None:
    saved = {"step": 10, "evaluated_step": 10, "best_top1": 18.5, "best_step": 5, "skipped_batches": [3]}
    progress = TypeAdapter(Progress).validate_python(saved)
    assert (progress.metric, progress.best_value, progress.best_step) == ("top1", 18.5, 5)


def test_a_run_without_improvement_ends_early_and_resumes_to_the_same_end(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate at which the loss rises at first. It is saved every 4 steps, and evaluated after each."""
    values = config.model_dump(mode="json", by_alias=True)
    values["optim"]["lr"], values["eval"] = 0.01, {"every_epochs": 0.125, "metric": "loss"}
    values["train"] |= {"patience": 4}
    stopping = Config.model_validate(values)
    assert train(stopping)
    run = stopping.run_dir
    losses = [line["loss"] for line in metrics(run, "eval")]
    last = len(losses)
    best = 1 + int(np.argmin(losses))
    assert best == last - 4 and 4 < last < 11  # the step of each evaluation is its number
    assert event_names(run) == ["early stop", "finished"] and read_run(run).state.startswith("finished early")
    lines = capsys.readouterr().out.splitlines()
    assert f"loss has not improved on {losses[best - 1]:.4f} in 4 evaluations (train.patience = 4)" in lines[-3]
    assert f"last loss {losses[-1]:.4f} ({run}/model.pdparams); best loss {losses[best - 1]:.4f} at epoch" in lines[-1]
    assert lines[-1].endswith(f"({run}/model_best.pdparams)")
    files = {"model.pdparams": ("latest", "last", last), "model_best.pdparams": ("best", "best", best)}
    written = {name: read_state(run / name) for name in files}
    for name, (link, which, step) in files.items():
        assert (run / "checkpoints" / link).resolve().name == f"step_{step:08d}"
        for state in (load_weights(run / "checkpoints" / link).state, load_weights(run, which=which).state):
            assert all(np.array_equal(state[key], written[name][key]) for key in state)

    # From a checkpoint before the end: the same end.
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.name[5:]) > 4:
            shutil.rmtree(path)
    assert train(stopping)
    assert [line["loss"] for line in metrics(run, "eval")] == losses + losses[4:]
    for name, state in written.items():
        again = read_state(run / name)
        assert all(np.array_equal(again[key], state[key]) for key in state)

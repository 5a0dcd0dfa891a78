"""Notes about settings that may be mistakes, and the results of a run whose average of the weights is too slow."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import TINY, metrics

from vit_static.config.loader import load_config
from vit_static.report.metric_names import format_metric
from vit_static.train.notes import config_notes
from vit_static.train.trainer import train


@pytest.mark.parametrize(
    ("overrides", "num_steps", "note"),
    [
        ([], 100, None),
        (["optim.ema_decay=0.9999", "optim.ema_warmup=false"], 375_000, None),
        (["optim.ema_decay=0.9999"], 100, None),  # the warmup makes the first decays smaller
        (
            ["optim.ema_decay=0.99996", "optim.ema_warmup=false"],
            766,  # 0.99996 ** 765 = exp(-765 / 25,000)
            "optim.ema_decay = 0.99996: the moving average of the weights has a time constant of 25,000 steps, and the "
            "run has 766: 97 % of the last average are the weights after the first step; set optim.ema_decay=0.987, or "
            "optim.ema_warmup=true",
        ),
        (["train.image_sizes=[[8, 0.5], [16, 1.0]]"], 100, None),
        (
            ["train.image_sizes=[[16, 0.5], [8, 1.0]]"],
            100,
            "train.image_sizes: the run ends with images of 8x8; evaluations and exports have model.image_size, 16x16",
        ),
    ],
)
def test_settings_that_may_be_mistakes_are_noted(
    tmp_path: Path, overrides: list[str], num_steps: int, note: str | None
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    config = load_config(tmp_path / "tiny.yaml", overrides)
    assert config_notes(config, num_steps) == ([] if note is None else [note])


def test_a_run_names_the_results_of_both_its_average_and_its_weights(
    tmp_path: Path, small_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    overrides = [f"data.root={small_digits}", f"output_dir={tmp_path}", "eval.metric=loss", "optim.lr=0.01"]
    overrides += ["loss.name=bce", "model.head_bias_init=5.0"]  # each step lowers the biases, and with them the loss
    config = load_config(tmp_path / "tiny.yaml", [*overrides, "optim.ema_decay=0.999", "optim.ema_warmup=false"])
    assert train(config)
    last = metrics(config.run_dir, "eval")[-1]
    assert last["loss"] < last["ema_loss"]
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("has a time constant of 1,000 steps, and the run has 11: 99 %") == 2  # at its start and end
    assert f"loss {format_metric('loss', last['ema_loss'])}" in printed.split("moving average: ")[1]
    assert f"last weights themselves: loss {format_metric('loss', last['loss'])} ({config.run_dir}/model.pdp" in printed
    assert "the average has not caught up with the weights: optim.ema_decay = 0.999" in printed

"""A run on a table with unbalanced classes, several labels per image or none, and every setting that balances."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import metrics
from helpers.small import read_state

from vit_static.common.errors import ConfigError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.train.trainer import train

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def table_run(config: Config, tmp_path: Path) -> Config:
    """Of every odd digit only two images are left; each digit has a second label, and zero has none at all.

    The validation set has no nine.
    """
    root = Path(config.data.root)
    for split in ("train", "val"):
        rows = ["path\tdigit"]
        for digit, name in enumerate(DIGITS):
            label = "" if digit == 0 else f"{name}|{'odd' if digit % 2 else 'even'}"
            paths = sorted((root / split / str(digit)).iterdir())[: 2 if digit % 2 else None]
            if (split, digit) != ("val", 9):
                rows += [f"{path.relative_to(root)}\t{label}" for path in paths]
        (tmp_path / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "weights.txt").write_text("".join(f"{name} 1\n" for name in (*DIGITS[1:], "even")) + "odd 2\n")
    return load_config(
        tmp_path / "tiny.yaml",
        [f"data.root={root}", f"data.train={tmp_path / 'train.tsv'}", f"data.val={tmp_path / 'val.tsv'}",
         "data.label_column=digit", 'data.label_separator="|"', "data.multi_label=true", "data.sampler=balanced",
         "loss.name=bce", f"loss.class_weights={tmp_path / 'weights.txt'}", "loss.pos_weight=3", "loss.focal_gamma=1",
         "model.num_classes=11", f"output_dir={tmp_path / 'output'}"],
    )  # fmt: skip


def test_a_balanced_run_on_a_table_resumes_with_the_same_bits(
    table_run: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """82 images in batches of 16 for 1.5 epochs: 7 steps, resumed after step 4."""
    assert train(table_run)
    output = "".join(capsys.readouterr())
    assert f"note: {table_run.data.val}: 1 of 11 classes have no image: 'nine'" in output
    assert "train.tsv: " not in output
    folder = table_run.run_dir
    expected, losses = read_state(folder / "model.pdparams"), [line["loss"] for line in metrics(folder, "train")]
    assert (folder / "class_names.txt").read_text().split() == sorted({*DIGITS[1:], "even", "odd"})
    assert np.isfinite([line["loss"] for line in metrics(folder, "eval")]).all()
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if checkpoint.name > "step_00000004":
            shutil.rmtree(checkpoint)
    (folder / "model.pdparams").unlink()
    assert train(table_run)
    resumed = read_state(folder / "model.pdparams")
    assert all(np.array_equal(resumed[name], expected[name]) for name in expected)
    assert metrics(folder, "train")[-1]["loss"] == losses[-1]
    shuffled = load_config(folder / "config.yaml", ["data.sampler=shuffle"])
    with pytest.raises(ConfigError, match=r"data.sampler = 'shuffle' \(it was 'balanced'\): cannot resume"):
        train(shuffled)

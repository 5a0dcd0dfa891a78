"""Images with several labels: two handwritten digits side by side, in lists of PLSC's format.

As a program, `PYTHONPATH=.:tests python -m helpers.digit_pairs` makes the set and the figures of configs/EVALUATION.md:
`make DIGITS PAIRS` from what `./run.sh data digits` has written, and `score MODEL PAIRS` on the pairs for testing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.metrics import f1_score


def make_digit_pairs(digits: Path, out: Path, sizes: dict[str, int], seed: int = 0) -> None:
    """Write pairs below `out`, with a list NAME.txt per split; `sizes` are the numbers for train, val and test.

    `digits` is the folder of `data digits`. The labels of a pair are its digits, or one label if they are equal. Digit
    d is drawn with a probability proportional to 0.75 ** d, so that the classes are unbalanced. No digit's image is in
    two splits: those of val and test are alternate ones of the digits' validation images.
    """
    random = np.random.default_rng(seed)
    shares = 0.75 ** np.arange(10)
    for split, num_pairs in sizes.items():
        files = {digit: _files(digits, split, digit) for digit in range(10)}
        (out / split).mkdir(parents=True)
        lines = []
        for number in range(num_pairs):
            pair = random.choice(10, 2, p=shares / shares.sum()).tolist()
            images = [Image.open(files[digit][random.integers(len(files[digit]))]) for digit in pair]
            canvas = Image.new("RGB", (images[0].width + images[1].width, images[0].height))
            canvas.paste(images[0], (0, 0))
            canvas.paste(images[1], (images[0].width, 0))
            name = f"{split}/{number:05d}.png"
            canvas.save(out / name)
            lines.append(f"{name} {','.join(map(str, sorted(set(pair))))}\n")
        (out / f"{split}.txt").write_text("".join(lines))


def _files(digits: Path, split: str, digit: int) -> list[Path]:
    files = sorted((digits / ("train" if split == "train" else "val") / str(digit)).iterdir())
    return files if split == "train" else files[{"val": 0, "test": 1}[split] :: 2]


def score(model: Path, pairs: Path) -> str:
    """Return the F1 in per cent of `predict` on the pairs for testing: at 0.5, and at the thresholds of the export."""
    listed = [line.rsplit(" ", 1) for line in (pairs / "test.txt").read_text().splitlines()]
    is_label = np.zeros((len(listed), 10), bool)
    for row, (_, labels) in zip(is_label, listed, strict=True):
        row[[int(label) for label in labels.split(",")]] = True
    paths = [pairs / path for path, _ in listed]
    probabilities, is_chosen = np.zeros(is_label.shape), np.zeros(is_label.shape, bool)
    for row, top in zip(probabilities, _predict(model, paths, "--top-k", "10"), strict=True):
        row[[entry["class"] for entry in top]] = [entry["probability"] for entry in top]
    for row, top in zip(is_chosen, _predict(model, paths), strict=True):
        row[[entry["class"] for entry in top]] = True
    lines = []
    for name, is_predicted in (("at 0.5", probabilities >= 0.5), ("at the thresholds", is_chosen)):
        macro, micro = (100.0 * f1_score(is_label, is_predicted, average=average) for average in ("macro", "micro"))
        rarest = 100.0 * f1_score(is_label[:, 9], is_predicted[:, 9])
        lines.append(f"{name}: macro F1 {macro:.2f}, micro F1 {micro:.2f}, of the rarest class {rarest:.2f}")
    return "\n".join(lines)


def _predict(model: Path, paths: list[Path], *options: str) -> list[list[dict[str, Any]]]:
    command = [sys.executable, "-m", "vit_static", "predict", "--model", model, *options, *paths]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line)["top"] for line in output.splitlines()]


if __name__ == "__main__":
    _, verb, first, second = sys.argv
    if verb == "make":
        make_digit_pairs(Path(first), Path(second), {"train": 3000, "val": 800, "test": 800})
    else:
        print(score(Path(first), Path(second)))

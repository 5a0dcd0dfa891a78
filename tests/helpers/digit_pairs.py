"""Images with several labels: two handwritten digits side by side, in lists of PLSC's format.

As a program, `PYTHONPATH=.:tests python -m helpers.digit_pairs DIGITS OUT` makes the set of the figures in
configs/TUTORIAL.md from what `./run.sh data digits --out DIGITS` has written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image


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


if __name__ == "__main__":
    make_digit_pairs(Path(sys.argv[1]), Path(sys.argv[2]), {"train": 3000, "val": 800, "test": 800})

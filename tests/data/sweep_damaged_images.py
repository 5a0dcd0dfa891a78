"""Sweep of damaged image files through `data check`, the training and evaluation loaders, and prediction's decoder.

    python tests/data/sweep_damaged_images.py 2000

JPEG, PNG, WebP, TIFF and BMP files are cut, have bits flipped or blocks zeroed, and are read in full batches, each bad
one among intact ones. Printed are the counts of what was read and refused, and every failure: a process that ended by a
signal, a bad file that wasn't named, or one that only some of the programs refuse.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FORMATS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *(("JPEG", ".jpg", {}), ("JPEG", ".jpg", {"progressive": True}), ("PNG", ".png", {}), ("BMP", ".bmp", {})),
    *(("WEBP", ".webp", {}), ("WEBP", ".webp", {"lossless": True}), ("TIFF", ".tif", {})),
    *(("TIFF", ".tif", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg")),
)
DAMAGES = ("cut", "cut in the header", "bits flipped", "bits flipped in the header", "zeroed", "zeroed in the header")
HEADER_BYTES, BATCH_SIZE, NUM_INTACT = 600, 64, 63


def damaged_file(number: int) -> tuple[str, bytes]:
    """Return the name and content of a damaged file, the same for the same number."""
    from helpers.sets import photo

    rng = random.Random(number)
    image_format, suffix, options = rng.choice(FORMATS)
    damage = rng.choice(DAMAGES)
    file = io.BytesIO()
    image = photo(96, 96, seed=number % 50)
    (image.convert("L") if rng.random() < 0.25 and options.get("compression") != "jpeg" else image).save(
        file, image_format, **options
    )
    content = bytearray(file.getvalue())
    size = min(HEADER_BYTES, len(content)) if "header" in damage else len(content)
    if damage.startswith("cut"):
        content = content[: rng.randrange(1, size)]
    elif damage.startswith("bits"):
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(size)] ^= 1 << rng.randrange(8)
    else:
        start = rng.randrange(size)
        stop = min(start + rng.choice([4, 16, 64, 512, 4096]), len(content))
        content[start:stop] = bytes(stop - start)
    return f"{number:05d} {damage}{suffix}", bytes(content)


def write_set(root: Path, count: int) -> None:
    """Write `count` damaged files and a batch's worth of intact ones, in two class folders of `root`/train."""
    from helpers.sets import photo

    for name in ("damaged", "intact"):
        (root / "train" / name).mkdir(parents=True)
    for number in range(count):
        name, content = damaged_file(number)
        (root / "train/damaged" / name).write_bytes(content)
    for number in range(NUM_INTACT):
        photo(96, 96, seed=1000 + number).save(root / "train/intact" / f"{number}.jpg")


def load(root: Path, first: int) -> None:
    """Load the damaged files from number `first` on, print one JSON line for each, and end at the first death.

    A file that the check accepts is loaded with others like it; every other file is in a batch of intact ones, which
    training or evaluation must refuse with its name. Prediction's decoder reads every file.
    """
    from vit_static.common.errors import DataError, PredictError
    from vit_static.config.data_schema import AugmentConfig, DataConfig, EvalConfig
    from vit_static.data.image_pixels import DecodeOptions
    from vit_static.data.loader import EvalLoader, TrainLoader
    from vit_static.data.open_set import open_set
    from vit_static.inference.image_io import read_pixels

    data = DataConfig(root=str(root), val="train", global_batch_size=BATCH_SIZE, num_threads=2, num_readers=2)
    report = json.loads((root / "data_check.json").read_text(encoding="utf-8"))
    refused = {problem["path"] for problem in report["problems"] if problem["stops_training"]}
    all_images = open_set(data, "train", 2)
    names = [all_images.relative_name(n) for n in range(len(all_images))]
    damaged = [name for name in names if "/damaged/" in name]
    if first == 0:  # all files that pass the check, in full batches
        good = all_images.exclude(refused)
        loader = TrainLoader(
            good, (32, 32), data, AugmentConfig(), seed=0, start_step=0, dp_rank=0, dp_size=1, device_id=None
        )
        for _ in range(-(-len(good) // BATCH_SIZE)):
            next(loader)
        del loader
        list(EvalLoader(good, (32, 32), BATCH_SIZE, data, EvalConfig(), dp_rank=0, dp_size=1, device_id=None))
    for number in range(first, len(damaged)):
        name = damaged[number]
        print(json.dumps({"begin": number}), flush=True)
        entry = {"number": number, "name": name, "refused": name in refused, "message": "", "predicted": True}
        if name in refused:
            images = all_images.exclude([other for other in damaged if other != name])
            try:
                if number % 2:
                    loader = TrainLoader(
                        images, (32, 32), data, AugmentConfig(), seed=0, start_step=0, dp_rank=0, dp_size=1,
                        device_id=None,
                    )  # fmt: skip
                    next(loader)
                else:
                    list(EvalLoader(images, (32, 32), 64, data, EvalConfig(), dp_rank=0, dp_size=1, device_id=None))
            except DataError as error:
                entry["message"] = str(error)
        try:
            read_pixels(root / name, DecodeOptions("apply", (255, 255, 255)))
        except PredictError:
            entry["predicted"] = False
        print(json.dumps(entry), flush=True)


def main() -> int:
    """Run the sweep, print its counts, and return 1 if there was a failure."""
    count, failures = int(sys.argv[1]), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_set(root, count)
        command = [sys.executable, "-m", "data_tools", "check", str(root)]
        code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
        if code not in (0, 1):
            print(f"data check ended with {code}")
            return 1
        problems = json.loads((root / "data_check.json").read_text(encoding="utf-8"))["problems"]
        signs = ("makes the decoder crash", "the decoder doesn't finish")
        failures += [f"{p['path']}: {p['detail']}" for p in problems if p["detail"].startswith(signs)]
        entries: list[dict[str, Any]] = []
        first = 0
        while first < count:
            command = [sys.executable, __file__, "--load", str(root), str(first)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            entries += [line for line in lines if "number" in line]
            if done.returncode == 0:
                break
            first = 1 + max((line.get("begin", -1) for line in lines), default=-1)
            failures.append(f"file {first - 1}: the process ended with {done.returncode}: {done.stderr[-300:]}")
            if done.returncode > 0 or first == 0:  # not a death by a signal, or before the first file
                break
        for entry in entries:
            if entry["refused"] and entry["name"] not in entry["message"]:
                failures.append(f"{entry['name']}: not named by the loader: {entry['message'] or 'it was read'}")
    counts: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        verdict = "refused" if entry["refused"] else "read"
        counts[Path(entry["name"]).suffix, verdict] += 1
        counts["predict", "read" if entry["predicted"] else "refused"] += 1
    for (kind, verdict), number in sorted(counts.items()):
        print(f"{kind:<14}{verdict:<12}{number}")
    stopping = Counter(p["kind"] for p in problems if p["stops_training"])
    print(f"data check: {dict(stopping)}")
    print(f"{len(entries)} of {count} files, {len(failures)} failures")
    print("\n".join(failures))
    return 1 if failures or len(entries) != count else 0


if __name__ == "__main__":
    if sys.argv[1] == "--load":
        load(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main())

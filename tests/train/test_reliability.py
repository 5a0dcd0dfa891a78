"""Runs that are killed at any moment and resume to the same bits; memory over a long run.

`./run.sh test -m reliability` runs these and the tests of bad input, and prints how many cases were tried.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers.forked_verbs import ForkedVerb, start_verb
from helpers.small import ROOT, read_state
from helpers.tiny import tiny_model

from vit_static.checkpoint.resume import verify_files
from vit_static.data.digits import make_digits

pytestmark = [pytest.mark.reliability, pytest.mark.slow]

# Everything that a state can hold: dropout, drop path, augmentation, mixup, accumulation, a moving average.
CONFIG = (
    tiny_model(dropout=0.1, drop_path_rate=0.1, drop_path_schedule="constant")
    + """
data: {global_batch_size: 16, num_threads: 1}
augment: {policy: randaugment, mixup_alpha: 0.2, cutmix_alpha: 0.5}
optim: {ema_decay: 0.9, clip_norm: 1.0}
parallel: {grad_accum_steps: 2}
train: {epochs: 1000, max_steps: 160}
eval: {every_epochs: 4}
checkpoint: {every_steps: 3}
log: {every_steps: 1}
"""
)
# The kills of one run at random moments; a whole night's: RELIABILITY_KILLS=200.
NUM_KILLS = int(os.environ.get("RELIABILITY_KILLS", "3"))
NUM_STEPS = int(os.environ.get("RELIABILITY_STEPS", "1000"))  # of the run whose memory is watched


def start(folder: Path, name: str, *overrides: str, before: str | None = None) -> ForkedVerb:
    """Start a run; its output goes to NAME.log. `before` is code that the process runs first."""
    config = ["pretrain", "-c", "run.yaml", "-o", f"name={name}"]
    arguments = [*config, *(word for override in overrides for word in ("-o", override))]
    return start_verb(arguments, folder, folder / f"{name}.log", before=before)


def weights(folder: Path, name: str) -> dict[str, np.ndarray]:
    run = folder / "output" / name
    return {
        f"{file} {key}": value
        for file in ("model.pdparams", "model_ema.pdparams")
        for key, value in read_state(run / file).items()
    }


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("reliability")
    (folder / "run.yaml").write_text(CONFIG.replace("data: {", f"data: {{root: {small_digits}, "))
    return folder


def wait_for_steps(path: Path, num_steps: int, process: ForkedVerb, since: int) -> bool:
    """Whether that many steps are logged before the process ends."""
    while process.exit_code is None:
        if path.exists() and path.read_text()[since:].count("images/s") >= num_steps:
            return True
        time.sleep(0.01)
    return False


def kill_at_random(folder: Path, name: str, num_kills: int, seed: int, *overrides: str) -> int:
    """Kill a run `num_kills` times, then let it end; return the number of kills.

    Each kill comes 3 to 7 steps after a resume, at any moment of a step, so that the run advances on any machine.
    """
    moments, num_killed = random.Random(seed), 0
    while True:
        log = folder / f"{name}.log"
        since = len(log.read_text()) if log.exists() else 0
        process = start(folder, name, *overrides)
        if num_killed < num_kills and wait_for_steps(log, moments.randint(3, 7), process, since):
            time.sleep(moments.uniform(0.0, 0.05))
            process.kill()
        code = process.wait()
        if code == 0:
            return num_killed
        assert code == -signal.SIGKILL, log.read_text()[-2000:]
        num_killed += 1


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(
    workplace: Path, tally: Callable[..., None]
) -> None:
    """A kill loses only the steps since the last checkpoint."""
    steps = f"train.max_steps={8 * NUM_KILLS}"  # of which each start does at least three
    with ThreadPoolExecutor(1) as other:
        reference = other.submit(lambda: start(workplace, "reference", steps).wait())
        num_killed = kill_at_random(workplace, "killed", NUM_KILLS, 1, steps)
        assert reference.result() == 0
    assert_equal(weights(workplace, "killed"), weights(workplace, "reference"))
    assert num_killed == NUM_KILLS
    tally("SIGKILL at a random moment", num_killed)
    tally("SIGKILL at a random moment", num_killed, "survived")
    tally("SIGKILL at a random moment", 0, "bytes lost")


# Where a process kills itself: the function, which of its calls count, at which of them, and what it does before.
MOMENTS = {
    "before `best` is moved": ("checkpoint.writer.replace_symlink", "args[0].name == 'best'", 1, ""),
    "in a step": ("program.program.Program.train_step", "True", 5, ""),
    "in an evaluation": ("program.program.Program.eval_step", "True", 2, ""),
    "with half a shard written": ("checkpoint.writer.write_shard", "True", 2, "args[1].write_bytes(b'half')"),
    "before the manifest": ("checkpoint.writer.CheckpointWriter._commit", "True", 2, ""),
    "before the rename": ("checkpoint.folder.fsync", "args[0].name.endswith('.part')", 2, ""),
    "before `latest` is moved": ("checkpoint.folder.replace_symlink", "os.readlink(args[0]) != args[1]", 1, ""),
    "with an old checkpoint half removed": (
        "checkpoint.folder.shutil.rmtree",
        "args[0].is_dir()",
        1,
        "next(args[0].iterdir()).unlink()",
    ),
    "before the weights are merged": ("train.results.write_pdparams", "True", 1, ""),
}
KILL = """
import os, signal
import vit_static.checkpoint.folder, vit_static.checkpoint.writer, vit_static.program.program, vit_static.train.results
from vit_static import checkpoint, program, train
count, function = 0, {path}
def killing(*args, **named):
    global count
    count += {counts}
    if count == {which} and {counts}:
        {first}
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **named)
{path} = killing
"""


def test_a_run_that_is_killed_at_each_critical_moment_resumes(workplace: Path, tally: Callable[..., None]) -> None:
    """One run, killed at one moment after the other, ends as a run that was never killed."""
    short = ["train.max_steps=54", "eval.every_epochs=1"]
    with ThreadPoolExecutor(2) as lanes:
        reference = lanes.submit(lambda: start(workplace, "short", *short).wait())
        for moment, (path, counts, which, first) in MOMENTS.items():
            code = KILL.format(path=path, counts=f"({counts})", which=which, first=first or "pass")
            process = start(workplace, "critical", *short, before=code)
            assert process.wait() == -signal.SIGKILL, (moment, (workplace / "critical.log").read_text()[-2000:])
            for folder in (workplace / "output/critical/checkpoints").glob("step_*"):
                verify_files(folder)
            tally(f"SIGKILL {moment}")
        assert reference.result() == 0
    assert start(workplace, "critical", *short).wait() == 0
    assert_equal(weights(workplace, "critical"), weights(workplace, "short"))
    names = {path.name for path in (workplace / "output/critical/checkpoints").iterdir()}
    assert not [name for name in names if name.startswith(".")]
    links = {link: (workplace / f"output/critical/checkpoints/{link}").resolve().name for link in ("latest", "best")}
    expected = {link: (workplace / f"output/short/checkpoints/{link}").resolve().name for link in ("latest", "best")}
    assert links == expected
    for moment in MOMENTS:
        tally(f"SIGKILL {moment}", 1, "survived")
        tally(f"SIGKILL {moment}", 0, "bytes lost")


def resident_mb(process: ForkedVerb) -> float | None:
    try:
        return psutil.Process(process.process_id).memory_info().rss / 2**20 or None
    except psutil.NoSuchProcess:
        return None


def test_memory_does_not_grow(workplace: Path, tally: Callable[..., None]) -> None:
    """Some steps of the quickstart with evaluations, with a smaller model and batch so that it takes less time.

    What could grow is per step, batch or evaluation, not per number of the model.
    """
    make_digits(workplace / "data/digits", "digit", 80)
    overrides = ["name=long", f"train.max_steps={NUM_STEPS}", "train.epochs=1000", "log.every_steps=50"]
    overrides += ["model.width=32", "model.depth=1", "model.num_heads=2", "model.mlp_dim=64", "model.patch_size=8"]
    overrides += ["data.global_batch_size=8", f"eval.every_epochs={100 * 8 / 1437:.4f}", "eval.batch_size=89"]
    arguments = ["pretrain", "-c", ROOT / "configs/quickstart.yaml"]
    arguments += [word for override in overrides for word in ("-o", override)]
    process = start_verb(arguments, workplace, workplace / "long.log")
    metrics, sizes = workplace / "output/long/metrics.jsonl", []
    while process.exit_code is None:
        time.sleep(0.3)
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        size = resident_mb(process)
        if steps and size is not None:
            sizes.append((max(steps), size))
    assert process.exit_code == 0, (workplace / "long.log").read_text()[-2000:]
    evaluations = [line for line in metrics.read_text().splitlines() if '"eval"' in line]
    assert len(evaluations) >= NUM_STEPS // 100
    early = max(size for step, size in sizes if 200 <= step <= NUM_STEPS // 2)
    late = max(size for step, size in sizes if step >= NUM_STEPS - 100)
    tally("memory after step 200", round(early), "MB")
    tally(f"memory after {NUM_STEPS:,} steps, {len(evaluations)} evaluations", round(late), "MB")
    assert late < 1.03 * early, sizes[:: max(len(sizes) // 20, 1)]

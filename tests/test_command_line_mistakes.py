"""Mistakes on the command line: one line that names each, and exit code 2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.command_line import run_sh, use_test_environment  # noqa: F401 - a fixture
from helpers.forked_verbs import run_verb
from helpers.small import ROOT


def make_set_with_empty_class(folder: Path) -> None:
    shutil.copytree(folder / "digits", folder / "holes")
    for path in (folder / "holes/train/4").iterdir():
        path.unlink()


MISTAKES = {
    "misspelt key": (
        ["pretrain", "-c", "tiny.yaml", "-o", "optim.weightdecay=1"],
        ["optim.weightdecay", "optim.weight_decay"],
    ),
    "misspelt section": (["pretrain", "-c", "tiny.yaml", "-o", "optm.lr=1"], ["optm", "did you mean optim"]),
    "wrong type": (["pretrain", "-c", "tiny.yaml", "-o", "optim.lr=fast"], ["optim.lr", "fast"]),
    "no such config": (["pretrain", "-c", "nowhere.yaml"], ["nowhere.yaml"]),
    "unknown verb": (["pretrian"], ["pretrian"]),
    "renamed verb": (["attend", "--model", "exported", "one.png"], ["attend is now called visualize"]),
    "renamed flag": (["plan", "--cards-per-node", "4"], ["--cards-per-node is now called --gpus-per-node"]),
    "unknown flag": (["pretrain", "--resum", "x"], ["--resum"]),
    "a batch that doesn't divide": (
        ["pretrain", "-c", "tiny.yaml", "-o", "parallel.grad_accum_steps=3"],
        ["data.global_batch_size = 16", "data.global_batch_size=15"],
    ),
    "an image that doesn't divide": (
        ["pretrain", "-c", "tiny.yaml", "-o", "model.image_size=30"],
        ["model.image_size", "patches of 8", "[32, 32]"],
    ),
    "heads that don't divide": (["pretrain", "-c", "tiny.yaml", "-o", "model.num_heads=3"], ["model.num_heads"]),
    "no such folder": (["pretrain", "-c", "tiny.yaml", "-o", "data.root=nowhere"], ["nowhere/train", "data.root"]),
    "an empty class folder": (["pretrain", "-c", "tiny.yaml", "-o", "data.root=holes"], ["holes/train/4"]),
    "another number of classes": (
        ["pretrain", "-c", "tiny.yaml", "-o", "model.num_classes=9"],
        ["model.num_classes", "10"],
    ),
    "no such weights": (
        ["finetune", "-c", "finetune.yaml", "-o", "init.from=output/none", "-o", "name=other"],
        ["output/none"],
    ),
    "another model's weights": (
        ["finetune", "-c", "finetune.yaml", "-o", "model.depth=3", "-o", "name=deeper"],
        ["output/tiny/model.pdparams", "blocks.1", "model.from=init"],
    ),
    "another model's checkpoint": (
        ["eval", "-c", "tiny.yaml", "-o", "model.width=64", "--checkpoint", "output/tiny"],
        ["output/tiny/model.pdparams", "model.*"],
    ),
    "a resume of another model": (
        ["pretrain", "-c", "tiny.yaml", "-o", "model.depth=3"],
        ["model.depth", "--resume never"],
    ),
    "no checkpoint": (["eval", "--checkpoint", "output/none"], ["output/none"]),
    "a GPU where there is none": (["pretrain", "-c", "tiny.yaml", "-o", "device=gpu"], ["device", "no GPU"]),
    "float16 on a CPU": (
        ["pretrain", "-c", "tiny.yaml", "-o", "amp.level=O2", "-o", "amp.dtype=float16"],
        ["amp", "amp.level=O1"],
    ),
    "more processes than asked for": (
        ["pretrain", "-c", "tiny.yaml", "-o", "parallel.dp=2"],
        ["parallel.dp", "NPROC=2"],
    ),
    "a mesh of more processes": (
        ["pretrain", "-c", "tiny.yaml", "-o", "parallel.mp=2"],
        ["mp = 2", "NPROC=2", "whose product is 1"],
    ),
    "an invalid mesh of GPUs": (
        ["plan", "-c", "tiny.yaml", "--mesh", "dp=3"],
        ["3 data-parallel", "global_batch_size=15"],
    ),
    "an unknown GPU": (["plan", "-c", "tiny.yaml", "--device", "b9000"], ["b9000", "h200"]),
    "no model to predict with": (["predict", "--model", "nowhere", "digits"], ["nowhere", "export"]),
    "a folder that isn't ours to replace": (
        ["export", "--checkpoint", "output/tiny", "--out", "digits"],
        ["digits", "--out"],
    ),
}


# One for each way of a mistake through run.sh and the launcher: found by one of them, by the verb at once, and by the
# verb once it has imported Paddle. The others run in forked processes.
THROUGH_RUN_SH = ["unknown verb", "misspelt key", "unknown flag", "no such folder", "an unknown GPU"]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it_and_exit_code_2(workplace: Path, mistake: str) -> None:
    if not (workplace / "holes").exists():
        make_set_with_empty_class(workplace)
    arguments, parts = MISTAKES[mistake]
    done = (run_sh if mistake in THROUGH_RUN_SH else run_verb)(*arguments, cwd=workplace)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stdout
    for part in parts:
        assert part in done.stderr
    assert (workplace / "output/tiny/model.pdparams").is_file() and (workplace / "digits/train/4").is_dir()


@pytest.mark.slow
def test_a_mistake_on_two_processes_is_printed_once(workplace: Path) -> None:
    done = run_sh("pretrain", "-c", "tiny.yaml", "-o", "data.global_batch_size=15", cwd=workplace, NPROC="2")
    assert done.returncode == 2
    assert done.stderr.count("data.global_batch_size = 15") == 1


@pytest.mark.slow
def test_an_unreadable_image_in_training_is_named(workplace: Path) -> None:
    shutil.copytree(workplace / "digits", workplace / "damaged")
    bad = sorted((workplace / "damaged/train/5").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:300])
    done = run_verb("pretrain", "-c", "tiny.yaml", "-o", "data.root=damaged", "-o", "name=damaged", cwd=workplace)
    assert done.returncode == 2
    assert bad.name in done.stderr and len(done.stderr.strip().splitlines()) == 1


def restore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    "argv", [("pretrain", "-c", "tiny.yaml", "-o", "name=early"), ("eval", "--checkpoint", "output/tiny")]
)
def test_interrupt_before_anything_is_built_is_clean(workplace: Path, argv: Sequence[str]) -> None:
    """Whatever is being imported at that moment."""
    processes = [
        subprocess.Popen(
            [ROOT / "run.sh", *argv],
            cwd=workplace,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that a script runs in the background inherit an ignored Ctrl-C.
            preexec_fn=restore_sigint,
        )
        for _ in range(3)
    ]
    for process, delay in zip(processes, (0.2, 0.2, 0.6), strict=True):
        while b"vit_static" not in Path(f"/proc/{process.pid}/cmdline").read_bytes().partition(b"-m")[2]:
            time.sleep(0.01)  # until run.sh has started Python
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
    for process in processes:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode in (75, -signal.SIGINT, 130)
        assert "Traceback" not in stderr


INTERRUPTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit an ignored one
class Finder:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize(
    ("entry", "module"),
    [
        ("vit_static", "vit_static.common.startup"),
        ("vit_static", "vit_static.cli.parser"),
        ("vit_static", "pydantic.main"),
        ("vit_static", "vit_static.config.schema"),
        ("vit_static.worker", "vit_static.common.errors"),
        ("vit_static.launch", "vit_static.common.text"),
        ("vit_static.launch", "pydantic.main"),
        ("data_tools", "vit_static.common.errors"),
        ("data_tools", "vit_static.data.digits"),
    ],
)
def test_ctrl_c_during_any_import_is_clean(tmp_path: Path, entry: str, module: str) -> None:
    """The first second of every command is imports; an exception in one would be a traceback, or become another."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING.format(module=module))
    words = {"data_tools": ["digits"], "vit_static.launch": ["pretrain", "-o", "seed=x"]}.get(entry, ["models"])
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", entry, *words], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode in (75, -signal.SIGINT)
    assert done.stdout == "" and "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1

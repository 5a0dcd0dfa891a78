"""Every command in the pages' code blocks runs, with a small model and data set, and prints what the page shows."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from helpers.forked_launch import run_forked_launch, run_forked_module
from helpers.forked_verbs import run_verb, start_verb
from helpers.pages import CONFIGS, PAGES, Command, page_name, read_commands
from helpers.sets import copy_part, photo
from helpers.small import REFERENCE, ROOT
from safetensors.numpy import load_file, save_file

from vit_static.data.digits import make_digits

pytestmark = [pytest.mark.slow, pytest.mark.early]

# Why commands whose text contains these words are not run here.
NOT_RUN = {
    "data imagenet ": "needs ImageNet's archives: tests/data_tools/test_imagenet.py makes small ones",
    "data imagenet21k": "needs WordNet's folders: tests/data_tools/test_imagenet21k.py",
    "data cifar10": "needs CIFAR's archive: tests/data_tools/test_cifar10.py",
    "--real real.json": "needs ImageNet's validation names: tests/train/test_extra_eval.py",
    "--imagenet-v2": "needs ImageNet's classes: tests/train/test_extra_eval.py",
    "eval.also=": "needs ImageNet's classes: tests/train/test_extra_eval.py",
    "PADDLE_NNODES=": "needs two terminals: tests/launch/test_nodes.py",
    "srun": "needs Slurm: tests/launch/test_slurm.py",
    "run.sh test": "the tests themselves",
    "plan -c configs/deit3_b16.yaml --search": "compiles twelve meshes: tests/plan/test_plan.py",
    "run.sh average": "needs several checkpoints and runs: tests/train/test_averaging.py",
    "log.trackers=": "needs W&B: tests/train/test_trackers.py",
    "doctor -c configs/": "the other doctor command runs: its checks take half a minute",
}
SMALL = {
    "device": "cpu",
    "model.variant": "Ti/16",
    "model.image_size": "16",
    "model.patch_size": "8",
    "model.width": "32",
    "model.depth": "1",
    "model.num_heads": "2",
    "model.mlp_dim": "64",
    "model.num_classes": "10",
    "model.pool": "cls",
    "model.class_token_pos_embed": "true",
    "model.layer_scale_init": "null",
    "model.representation_size": "null",
    "amp.level": "O0",
    "data.global_batch_size": "16",
    "data.num_threads": "1",
    "train.max_steps": "2",
    "log.every_steps": "2",
}
# Keys that a page sets and that are changed: to train longer, or a larger model, shows nothing more here.
REPLACED = ("train.max_steps", "model.image_size")
# Lines that a run of two steps doesn't print.
LONG_RUNS_ONLY = ("...", "expected end ")
TRAINING = ("pretrain", "finetune")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the configs, the digits, and the runs, exports and weights that the pages presuppose."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "configs").symlink_to(CONFIGS)
    make_digits(folder / "all", "digit", 80)
    copy_part(folder / "all", folder / "data/ILSVRC2012", 6, 3)
    for name in ("data/digits", "data/mine", "data/ImageNet21K", "ROOT", "dataset/ILSVRC2012"):
        shutil.copytree(folder / "data/ILSVRC2012", folder / name)
    make_digits(folder / "all_parity", "parity", 80)
    copy_part(folder / "all_parity", folder / "data/digits_parity", 20, 5)
    write_class_folders(folder)
    write_lists(folder)
    for name in ("IMAGE.jpg", "cat.jpg", "dog.jpg", "photos/1.jpg", "photos/2.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        photo(40, 60).save(folder / name)
    (folder / "key").write_text("8-characters-or-more")
    in_base64 = base64.b64encode((folder / "cat.jpg").read_bytes()).decode()
    (folder / "cat.json").write_text(json.dumps({"images": [in_base64]}))
    run(folder, Command("", "", ["pretrain"]))
    run(folder, Command("", "", ["export", "--checkpoint", "output/quickstart", "--out", "exported"]))
    augreg = "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz"
    for name in ("vit.npz", "timm.safetensors", "dinov2.safetensors", augreg):
        run(folder, Command("", "", ["convert", "--from", "output/quickstart", "--to", name]))
    shutil.copytree(REFERENCE / "weights" / "hf_clip", folder / "clip")
    arrays = load_file(REFERENCE / "weights" / "dinov3.safetensors")
    # Its patches are of 3 pixels, which don't divide the published models' images.
    arrays["patch_embed.proj.weight"] = np.pad(arrays["patch_embed.proj.weight"], [(0, 0), (0, 0), (0, 1), (0, 1)])
    save_file(arrays, folder / "dinov3.safetensors")
    (folder / "hf").mkdir()
    for name in ("imagenet2012-ViT-B_16-224.pdparams", "imagenet2012-ViT-B_16-384.pdparams"):
        shutil.copy(folder / "output/quickstart/model.pdparams", folder / name)
    return folder


def write_class_folders(folder: Path) -> None:
    """Write `pictures` and `PICTURES`, which have a folder per class and no split."""
    names = [line.split()[1] for line in (folder / "data/digits/class_names.txt").read_text().splitlines()]
    for split in ("train", "val"):
        for path in (folder / "data/digits" / split).glob("*/*"):
            for root in ("pictures", "PICTURES"):
                (folder / root / names[int(path.parent.name)]).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / root / names[int(path.parent.name)])
    for number, name in ((59, "three"), (44, "seven")):  # images that TUTORIAL.md names
        source = next((folder / "all").rglob(f"digit_{number:04}.jpeg"))
        shutil.copy(source, folder / "pictures" / name)


def write_lists(folder: Path) -> None:
    """Write PLSC's lists, a list of the digits, and tables of `pictures`."""
    for split in ("train", "val"):
        paths = sorted((folder / "data/digits" / split).glob("*/*"))
        lines = [f"{split}/{path.parent.name}/{path.name} {path.parent.name}\n" for path in paths]
        (folder / f"dataset/ILSVRC2012/{split}_list.txt").write_text("".join(lines))
        name = {"train": "image_all_list.txt", "val": "image_dummy_val_list.txt"}[split]
        (folder / "data/ImageNet21K" / name).write_text("".join(lines))
        if split == "train":
            (folder / "data/digits/rare.txt").write_text("".join(lines))
    pictures = sorted(path.relative_to(folder / "pictures") for path in (folder / "pictures").glob("*/*"))
    for split, first in (("train", 0), ("val", 1)):
        rows = [f"{path},{path.parent}\n" for path in pictures[first::2]]
        (folder / f"pictures/{split}.csv").write_text("path,species\n" + "".join(rows))


def run(folder: Path, command: Command) -> CompletedProcess[str]:
    """Run a command with a small model, as many processes as NPROC says, and without a time limit of its own."""
    verb, *arguments = (re.sub("=/(shared/)?(data|output)", r"=\2", word) for word in command.arguments)
    environ = dict(word.split("=", 1) for word in shlex.split(command.before))
    if verb == "data":
        done = run_forked_module("data_tools", *arguments, cwd=folder, timeout_s=240, environ=os.environ | environ)
    elif verb in (*TRAINING, "eval"):
        is_small = verb == "eval" and not any(word.startswith("configs/") for word in arguments)  # it is a run's
        settings = [] if is_small else small_settings(command)
        if verb in TRAINING:
            settings += ["--resume", "never"]  # several pages train runs of the same name
        done = run_forked_launch(verb, *arguments, *settings, cwd=folder, **environ)
    elif verb == "doctor":
        words = [verb, *arguments, *small_settings(command)]
        done = run_forked_module("vit_static", *words, cwd=folder, timeout_s=240, environ=os.environ | environ)
    else:
        done = run_verb(verb, *arguments, cwd=folder)
    return done


def small_settings(command: Command) -> list[str]:
    """Return -o options with the small settings that the command doesn't set itself."""
    given = {word.partition("=")[0] for word in command.arguments if "=" in word} - set(REPLACED)
    settings = {key: value for key, value in SMALL.items() if key not in given}
    config = next((word for word in command.arguments if word.startswith("configs/")), "")
    if "parallel.pp=2" in command.arguments:
        settings["model.depth"] = "2"
    if "finetune" in command.arguments and not config:
        settings["model.num_classes"] = "2"
    if "init.from" not in given and config.startswith(("configs/augreg", "configs/deit3_b16_224")):
        settings["init.from"] = "vit.npz"
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_pages_commands_run(page: Path, workplace: Path) -> None:
    server = None
    folder = workplace
    if page == ROOT / "README.md":  # as in a fresh clone
        folder = workplace / "clone"
        folder.mkdir()
        (folder / "configs").symlink_to(CONFIGS)
    try:
        for command in read_commands(page):
            if any(words in command.text for words in NOT_RUN):
                continue
            if command.arguments[0] == "serve":
                if server:
                    server.stop()
                server = Server(command, folder)
                continue
            done = server.curl(command) if server and command.arguments[0] == "curl" else run(folder, command)
            is_refused = len(command.output) == 1 and command.output[0].startswith("vit_static: ")
            assert done.returncode == (2 if is_refused else 0), f"{command.text}\n{done.stderr}"
            printed = done.stdout + done.stderr
            assert '{"error":' in "".join(command.output) or '{"error":' not in printed, f"{command.text}\n{printed}"
            if command.arguments[0] == "plan":  # doesn't depend on the machine
                missing = [line for line in command.output if line not in printed.splitlines()]
            else:
                missing = lines_not_printed(command.output, printed)
            assert not missing, "\n".join([command.text, "doesn't print", *missing, "but", printed])
    finally:
        if server:
            server.stop()


class Server:
    """The server of a page, at a free port instead of the page's."""

    def __init__(self, command: Command, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = str(free.getsockname()[1])
        words = [*command.arguments, "--port", self._port]
        output = folder / f"serve_{self._port}.txt"
        self._verb = start_verb(words, folder, output)
        end = time.monotonic() + 120
        while not output.is_file() or "serving " not in output.read_text():
            assert self._verb.exit_code is None and time.monotonic() < end, output.read_text()
            time.sleep(0.1)
        assert not lines_not_printed(command.output, output.read_text()), output.read_text()

    def curl(self, command: Command) -> CompletedProcess[str]:
        text = re.sub(r"localhost:\d+", f"localhost:{self._port}", command.text.removeprefix("$ "))
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", text], cwd=self._folder, capture_output=True, text=True, check=False
        )

    def stop(self) -> None:
        os.kill(self._verb.process_id, signal.SIGTERM)
        assert self._verb.wait(60) == 75


def lines_not_printed(expected: list[str], printed: str) -> list[str]:
    """Return the expected lines that no printed line matches.

    What depends on the machine, on time and on the settings may differ: numbers, names of CPUs, and which class a model
    predicts. Of JSON the keys must agree.
    """
    lines = unwrapped(printed.splitlines())
    return [
        line
        for line in unwrapped(expected)
        if not line.startswith(LONG_RUNS_ONLY) and not any(matches(line, other) for other in lines)
    ]


def unwrapped(lines: list[str]) -> list[str]:
    """Return the lines with single spaces, and joined where a line of a run's summary continues in the next one."""
    joined: list[str] = []
    for line in lines:
        words = " ".join(line.split())
        if joined and re.match(r" {13}\S", line):
            joined[-1] += f" {words}"
        elif words:
            joined.append(words)
    return joined


def matches(expected: str, printed: str) -> bool:
    if expected.startswith("{"):
        return printed.startswith("{") and set(json_keys(expected)) <= set(json_keys(printed))
    return re.fullmatch(line_pattern(expected), printed) is not None


def json_keys(text: str) -> list[str]:
    return re.findall(r'"(\w+)":', text)


# What may differ, and a pattern of what it may be instead.
VARIABLE = {
    r"\.\.\.$": r".*",
    r"; (?:last )?top-1 .*": r"; .*",  # which evaluation was the best
    r" images(?: \(best\))?$": r" images(?: \(best\))?",
    r"(?:\d+ (?:h|min|s|ms)\b ?)+": r"(?:[\d.]+ (?:h|min|s|ms)\b ?)+",
    r"[\d.,]+ [kMGT]?B\b": r"[\d.,]+ (?:[kMGT]?B|bytes)",
    r"\((?:AMD|Intel)[^)]*\)": r"\([^)]*\)",
    r"\w+ (?=\d[\d.]*%)": r"\w+ ",
    r"[A-Z][a-z]{2} \d+ [A-Z][a-z]{2} [\d:]+": r"[A-Z][a-z]{2} \d+ [A-Z][a-z]{2} [\d:]+",
    r"-?\d[\d.,]*(?:e[-+]\d+)?": r"-?\d[\d.,]*(?:e[-+]\d+)?",
}


def line_pattern(line: str) -> str:
    """Return a pattern of the lines that are as good as this one."""
    pattern, at = "", 0
    while at < len(line):
        for variable, replacement in VARIABLE.items():
            found = re.compile(variable).match(line, at)
            if found:
                pattern += replacement
                at = found.end()
                break
        else:
            pattern += re.escape(line[at])
            at += 1
    return pattern


def test_what_is_not_run_is_on_the_pages() -> None:
    texts = [command.text for page in PAGES for command in read_commands(page)]
    assert [words for words in NOT_RUN if not any(words in text for text in texts)] == []
    assert len(texts) > 50

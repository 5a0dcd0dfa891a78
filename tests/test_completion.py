"""Shell completion: what bash and zsh complete, in functions called by hand and in shells on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from vit_static.cli.completion import completion_script
from vit_static.cli.parser import make_parser
from vit_static.common.installation import DATA_TOOLS
from vit_static.config.schema import Config
from vit_static.model.variants import VARIANTS

SCRIPT_NAMES = {"bash": "run.bash", "zsh": "_run.sh"}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the script of each shell."""
    folder = tmp_path_factory.mktemp("scripts")
    for shell, name in SCRIPT_NAMES.items():
        (folder / name).write_text(completion_script(make_parser(), shell))
    return folder


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("pre", "pretrain predict"),
        ("pretrain --re", "--resume"),
        ("pretrain -c deit_", "deit_b16 deit_b16_distilled deit_s16"),
        ("pretrain -c mi", "mine.yaml"),
        ("pretrain -o optim.weight_d", "optim.weight_decay="),
        ("pretrain -o amp.level=", "auto O0 O1 O2"),
        ("pretrain -o model.variant=T", " ".join(name for name in VARIANTS if name.startswith("T"))),
        ("pretrain -o data.prepare=", "digits digits_parity null"),
        ("pretrain -o optim.ema_warmup=f", "false"),
        ("pretrain -o init.from=mi", "mine.yaml"),
        ("pretrain --resume ", "auto never runs"),
        ("data ", " ".join(DATA_TOOLS)),
        ("config sche", "schedule schedule.*"),
        ("help pre", "pretrain predict"),
        ("bench in", "infer"),
        ("export --checkpoint mi", "mine.yaml"),
        ("eval --weights be", "best"),
    ],
)
def test_bash_completes(scripts: Path, tmp_path: Path, line: str, completed: str) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "runs").mkdir()
    words = re.findall(r"=|[^ =]+", f"./run.sh {line}") + [""] * line.endswith(" ")  # as readline separates them
    given = f"COMP_WORDS=({' '.join(word or repr(word) for word in words)}); COMP_CWORD={len(words) - 1}"
    commands = f"source {scripts / SCRIPT_NAMES['bash']}; {given}; _vit_static_complete; echo ${{COMPREPLY[*]}}"
    done = subprocess.run(["bash", "-c", commands], cwd=tmp_path, capture_output=True, text=True, check=True)
    if completed == "schedule schedule.*":
        completed = " ".join(["schedule", *(f"schedule.{key}" for key in Config(name="run").schedule.model_dump())])
    assert done.stdout.split() == completed.split()


@pytest.mark.parametrize("shell", SCRIPT_NAMES)
def test_an_interactive_shell_completes(scripts: Path, tmp_path: Path, shell: str) -> None:
    """Two Tabs after another: the first completes the key, with its equals sign, and the second the value."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "runs").mkdir()
    lines = {
        "pretrain -o amp.lev\tO2\t --resume nev\t": "pretrain -o amp.level=O2 --resume never",
        "pretrain -o kernels.one\tf\t -o log.ev\t5": "pretrain -o kernels.onednn=false -o log.every_steps=5",
        "data fol\t": "data folder",
        "config sched\t": "config schedule",
        "help evalu\beval\t": "help eval",
    }
    lines = {line: expected for line, expected in lines.items() if "\b" not in line}
    assert typed(shell, scripts, tmp_path, list(lines)) == list(lines.values())


def typed(shell: str, scripts: Path, folder: Path, lines: Sequence[str]) -> list[str]:
    """Type lines into a shell on a pseudo-terminal, and return the arguments that run.sh gets."""
    setup = {
        "bash": f"source {scripts / SCRIPT_NAMES['bash']}",
        "zsh": f"fpath=({scripts} $fpath); autoload -Uz compinit; compinit -u -D",
    }[shell]
    options = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}[shell]
    terminal, end = pty.openpty()
    environ = {"PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(folder)}
    process = subprocess.Popen(
        [shell, *options], stdin=end, stdout=end, stderr=end, cwd=folder, env=environ, start_new_session=True
    )
    os.close(end)
    define = "run.sh() { printf 'GO''T<%s>\\n' \"$*\"; }"
    os.write(terminal, "\n".join([setup, define, *(f"run.sh {line}" for line in lines), ""]).encode())
    output, give_up = b"", time.monotonic() + 60
    try:
        while len(printed := re.findall(rb"GOT<(.*?)>", output)) < len(lines):
            assert time.monotonic() < give_up, output
            if select.select([terminal], [], [], 1.0)[0]:
                output += os.read(terminal, 65536)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    return [line.decode() for line in printed]


def test_the_scripts_name_the_command() -> None:
    assert "complete -o bashdefault -o default -F _vit_static_complete run.sh" in completion_script(
        make_parser(), "bash"
    )
    assert completion_script(make_parser(), "zsh").startswith("#compdef run.sh")

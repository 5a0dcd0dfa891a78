"""run.sh, the launcher that it starts, and the lock file.

Nothing is installed, and no network is used: in the environment of run.sh, `python -m pip` only logs its arguments.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from vit_static.launch import topology

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / ".requirements" / "lock.txt"

# Appends pip's command line and the requirement files that it names to pip.log.
ENVIRONMENT_PYTHON = """#!/bin/sh
case "$*" in
    "-m pip --version" | "-m pip uninstall"* | "-m compileall"*) exit 0 ;;
    "-m pip"*)
        echo "$*" >> {log}
        for argument; do case $argument in /dev/fd/*) cat "$argument" >> {log} ;; esac; done
        [ ! -e {failure} ] || {{ cat {failure} >&2; exit 1; }}
        exit 0 ;;
esac
exec {python} "$@"
"""

# A verb that prints its rank, then takes the action that an argument "rankN=ACTION" names: an exit code, or "wait".
WORKER = """
import os, signal, sys, time
rank = os.environ.get("PADDLE_TRAINER_ID", "0")
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
action = dict(argument.split("=") for argument in sys.argv[2:]).get("rank" + rank, "0")
print(f"rank {rank} of {os.environ.get('PADDLE_TRAINERS_NUM', '1')} in {os.getcwd()}", flush=True)
print(f"error output of rank {rank}", file=sys.stderr)
if action == "wait":
    signal.sigwait({signal.SIGTERM})
    action = "75"
sys.exit(int(action))
"""


class Checkout:
    """A copy of the files that setup needs, in a path with a space, next to an active environment."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.pip_log = folder / "pip.log"
        self.pip_failure = folder / "pip-failure"
        self.environment = folder / "environment"
        python = self.environment / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(ENVIRONMENT_PYTHON.format(log=self.pip_log, failure=self.pip_failure, python=sys.executable))
        python.chmod(0o755)
        shutil.copytree(ROOT / ".requirements", self.root / ".requirements")
        shutil.copy(ROOT / "run.sh", self.root)
        package = self.root / "vit_static"
        package.mkdir()
        (package / "__init__.py").touch()
        shutil.copy(ROOT / "vit_static" / "__main__.py", package)
        (package / "worker.py").write_text(WORKER)
        for name in ("launch", "config", "common"):
            shutil.copytree(ROOT / "vit_static" / name, package / name)
        self.caller_folder = folder / "caller"
        self.caller_folder.mkdir()

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        active = {"VIRTUAL_ENV": str(self.environment), "VIT_STATIC_DEVICE": "cpu"}
        return subprocess.Popen(
            [str(self.root / "run.sh"), *arguments],
            cwd=self.caller_folder,
            env={**inherited, **active, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environ)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def pip_calls(self) -> str:
        return self.pip_log.read_text() if self.pip_log.exists() else ""


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def set_up(checkout: Checkout) -> Checkout:
    assert checkout.run("setup").returncode == 0
    return checkout


def fake_nvidia_smi(folder: Path, cuda: str, num_gpus: int, capabilities: str = "8.0") -> str:
    """Make a PATH on which nvidia-smi reports a driver and GPUs that this machine may not have.

    `capabilities`: the compute capabilities, one per line; "" for a driver that doesn't know the query.
    """
    folder.mkdir()
    tool = folder / "nvidia-smi"
    listing = "".join(f"GPU {i}: a GPU (UUID: {i})\\n  MIG 1g.18gb\\n" for i in range(num_gpus))
    table = f"| NVIDIA-SMI 555.1    Driver Version: 555.1    CUDA Version: {cuda}     |\\n"
    query = f'printf "{capabilities}\\n"' if capabilities else "echo 'Field \"compute_cap\" is not valid.'; exit 2"
    cases = f'-L) printf "{listing}" ;; --query-gpu=compute_cap) {query} ;; *) printf "{table}" ;;'
    tool.write_text(f"#!/bin/sh\ncase $1 in {cases} esac\n")
    tool.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# run.sh setup


def test_setup_installs_the_lock_and_the_second_call_does_nothing(checkout: Checkout) -> None:
    first = checkout.run("setup")
    assert first.returncode == 0
    assert "installing" in first.stderr
    assert "--require-hashes" in checkout.pip_calls()

    calls = checkout.pip_calls()
    second = checkout.run("setup")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert checkout.pip_calls() == calls


def test_setup_follows_a_changed_lock(set_up: Checkout) -> None:
    calls = set_up.pip_calls()
    with (set_up.root / ".requirements" / "lock.txt").open("a") as lock:
        lock.write("# changed\n")
    assert set_up.run("setup").returncode == 0
    assert set_up.pip_calls() != calls


def test_a_failed_setup_says_why_in_one_line_and_the_next_one_repairs_it(checkout: Checkout) -> None:
    checkout.pip_failure.write_text("Collecting\nERROR: No space left on device\n")
    failed = checkout.run("setup")
    assert failed.returncode == 1
    last_line = failed.stderr.splitlines()[-1]
    assert "No space left on device" in last_line
    log = re.search(r"output: (.*)\)", last_line)
    assert log and "Collecting" in Path(log[1]).read_text()

    checkout.pip_failure.unlink()
    assert checkout.run("setup").returncode == 0
    # The failed set-up may have left incomplete packages.
    assert "--force-reinstall" in checkout.pip_calls().splitlines()[-1]


def test_two_setups_at_once_install_once(checkout: Checkout) -> None:
    both = [checkout.start("setup"), checkout.start("setup")]
    for process in both:
        process.communicate(timeout=60)
    assert [process.returncode for process in both] == [0, 0]
    assert checkout.pip_calls().count("pip install") == 1


def test_an_unknown_device_is_refused(checkout: Checkout) -> None:
    result = checkout.run("setup", VIT_STATIC_DEVICE="tpu")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "VIT_STATIC_DEVICE=tpu" in result.stderr


def test_a_broken_active_environment_is_refused(checkout: Checkout) -> None:
    result = checkout.run("setup", VIRTUAL_ENV=str(checkout.root / "nowhere"))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def test_an_environment_behind_a_link_is_not_emptied(checkout: Checkout) -> None:
    """It may belong to another checkout."""
    (checkout.root / ".venv").symlink_to(checkout.environment)
    result = checkout.run("setup", VIRTUAL_ENV="")
    assert result.returncode == 2 and "is a link" in result.stderr and len(result.stderr.splitlines()) == 1
    assert (checkout.environment / "bin" / "python").is_file()


def test_without_a_supported_python_setup_says_so(checkout: Checkout) -> None:
    result = checkout.run("setup", VIRTUAL_ENV="", PYTHON="/bin/false")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "PYTHON=" in result.stderr


@pytest.mark.parametrize(
    ("cuda", "capabilities", "folder"),
    [
        *(("12.4", "8.0", "cu126"), ("12.9", "9.0", "cu129"), ("13.1", "8.9", "cu129")),
        *(("12.8", "12.0", "cu129"), ("12.8", "10.0", "cu129"), ("12.8", "9.0\\n9.0", "cu126")),  # Blackwell, Hopper
        ("12.8", "8.6\\n12.0", "cu129"),
        *(("12.9", "7.0", "cu126"), ("13.1", "6.1", "cu126")),  # Volta, Pascal
        *(("12.2", "", "cu126"), ("12.9", "", "cu129")),  # the driver doesn't report it
    ],
)
def test_on_a_gpu_paddle_comes_from_its_own_index(
    checkout: Checkout, tmp_path: Path, cuda: str, capabilities: str, folder: str
) -> None:
    path = fake_nvidia_smi(tmp_path / "bin", cuda, num_gpus=2, capabilities=capabilities)
    assert checkout.run("setup", VIT_STATIC_DEVICE="", PATH=path).returncode == 0
    calls = checkout.pip_calls()
    version = pins("paddlepaddle")[0].specifier
    assert re.search(rf"--extra-index-url \S+/{folder}/ paddlepaddle-gpu{version}", calls)
    assert "\npaddlepaddle==" not in calls
    assert "\npillow==" in calls


def test_a_driver_that_is_too_old_is_refused(checkout: Checkout, tmp_path: Path) -> None:
    result = checkout.run("setup", VIT_STATIC_DEVICE="", PATH=fake_nvidia_smi(tmp_path / "bin", "11.8", 1))
    assert result.returncode == 2
    assert "CUDA 11.8" in result.stderr


# run.sh VERB


def test_a_verb_runs_in_the_callers_folder_through_a_link_too(set_up: Checkout) -> None:
    link = set_up.caller_folder / "run.sh"
    link.symlink_to(set_up.root / "run.sh")
    set_up.root = set_up.caller_folder  # `run` calls the link from here on
    result = set_up.run("predict")
    assert result.returncode == 0
    assert result.stdout == f"rank 0 of 1 in {set_up.caller_folder}\n"


@pytest.mark.parametrize("nproc", ["abc", "0", "-1", "1.5"])
def test_an_invalid_number_of_processes_is_refused(set_up: Checkout, nproc: str) -> None:
    result = set_up.run("pretrain", NPROC=nproc)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"vit_static: NPROC={nproc}: it must be a positive integer"]


def test_one_process_is_the_program_itself(set_up: Checkout) -> None:
    result = set_up.run("pretrain", "rank0=75")
    assert result.returncode == 75
    assert "rank 0 of 1" in result.stdout
    assert not (set_up.caller_folder / "log").exists()


def test_of_two_processes_the_terminal_shows_rank_0(set_up: Checkout) -> None:
    result = set_up.run("pretrain", NPROC="2")
    assert result.returncode == 0
    assert result.stdout == f"rank 0 of 2 in {set_up.caller_folder}\n"
    assert result.stderr == "error output of rank 0\n"
    (log,) = set_up.caller_folder.glob("log/*/workerlog.1")
    assert "error output of rank 1" in log.read_text()


@pytest.mark.parametrize(
    ("actions", "exit_code"),
    [
        (["rank0=2", "rank1=2"], 2),
        (["rank0=75", "rank1=75"], 75),
        (["rank0=75", "rank1=1"], 1),
        (["rank0=3", "rank1=3"], 1),
    ],
)
def test_the_exit_code_is_the_workers(set_up: Checkout, actions: list[str], exit_code: int) -> None:
    assert set_up.run("pretrain", *actions, NPROC="2").returncode == exit_code


def test_the_last_lines_of_a_failed_rank_are_shown(set_up: Checkout) -> None:
    result = set_up.run("pretrain", "rank1=2", NPROC="2")
    assert result.returncode == 2
    assert "error output of rank 1" in result.stderr


def test_sigterm_reaches_every_worker_once_and_leaves_none(set_up: Checkout) -> None:
    process = set_up.start("pretrain", "rank0=wait", "rank1=wait", NPROC="2")
    assert process.stdout
    process.stdout.readline()  # rank 0 has started; SIGTERM ends rank 1 even if it hasn't
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)  # returns only when no worker holds the pipe
    assert process.returncode in (75, 128 + signal.SIGTERM)


def test_two_nodes_number_their_ranks_by_themselves(set_up: Checkout) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        master = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [set_up.start("eval", PADDLE_NNODES="2", PADDLE_MASTER=master) for _ in range(2)]
    outputs = [node.communicate(timeout=60)[0] for node in nodes]
    assert sorted(line.split(" in ")[0] for line in outputs) == ["rank 0 of 2", "rank 1 of 2"]
    assert [node.returncode for node in nodes] == [0, 0]


@pytest.mark.parametrize(
    ("environ", "num_local"),
    [
        ({}, 4),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "3,-1,2"}, 1),  # as CUDA reads it: nothing after an invalid entry
        ({"CUDA_VISIBLE_DEVICES": "0,1", "NPROC": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "VIT_STATIC_DEVICE": "cpu"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
    ],
)
def test_one_process_per_visible_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], num_local: int
) -> None:
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", "12.9", num_gpus=4))
    assert topology.find_layout(environ).num_local == num_local


# The lock


def locked() -> list[Requirement]:
    lines = LOCK.read_text().splitlines()
    return [Requirement(line.removesuffix("\\")) for line in lines if re.match(r"[a-z0-9]", line)]


def pins(name: str) -> list[Requirement]:
    return [pin for pin in locked() if canonicalize_name(pin.name) == canonicalize_name(name)]


def declared(*extras: str) -> list[Requirement]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"]]
    texts += [config["options.extras_require"][extra] for extra in extras]
    lines = [line for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


PYTHONS = ["3.10.0", "3.11.0", "3.12.0", "3.13.0"]
LOCKED_EXTRAS = ("cpu", "imagenet", "serve", "onnx", "parquet", "test", "lint")
TRACKERS = ("wandb", "mlflow", "swanlab")  # users install those that they have an account for


def applies(requirement: Requirement, python: str) -> bool:
    environment = {**default_environment(), "python_full_version": python, "python_version": python[:4]}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def test_the_lock_has_every_extra_but_the_gpu_build_openvino_and_trackers() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert {*LOCKED_EXTRAS, "gpu", "openvino", *TRACKERS} == set(config["options.extras_require"])
    command = LOCK.read_text().splitlines()[1]
    assert re.findall(r"--extra (\w+)", command) == list(LOCKED_EXTRAS)


@pytest.mark.parametrize(
    ("requirement", "python"),
    [
        (requirement, python)
        for python in PYTHONS
        for requirement in declared(*LOCKED_EXTRAS)
        if applies(requirement, python)
    ],
    ids=str,
)
def test_the_lock_pins_the_requirements_of_setup_cfg(requirement: Requirement, python: str) -> None:
    chosen = [pin for pin in pins(requirement.name) if applies(pin, python)]
    assert len(chosen) == 1
    (specifier,) = chosen[0].specifier
    assert specifier.operator == "=="
    assert requirement.specifier.contains(specifier.version)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_one_version_of_each_package(python: str) -> None:
    names = [canonicalize_name(pin.name) for pin in locked() if applies(pin, python)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("python", "is_supported"), [("3.9", False), *((v[:4], True) for v in PYTHONS), ("3.14", False)]
)
def test_setup_cfg_and_run_sh_support_the_same_pythons(python: str, is_supported: bool) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert SpecifierSet(config["options"]["python_requires"]).contains(f"{python}.0") is is_supported
    (condition,) = re.findall(r"assert (.*)\[:2\] <= (.*)' 2>", (ROOT / "run.sh").read_text())
    low, high = (tuple(map(int, re.findall(r"\d+", bound))) for bound in condition)
    assert (low <= tuple(map(int, python.split("."))) <= high) is is_supported


def test_both_builds_of_paddle_have_the_same_version() -> None:
    (gpu,) = [requirement for requirement in declared("gpu") if requirement.name == "paddlepaddle-gpu"]
    assert gpu.specifier == pins("paddlepaddle")[0].specifier


def test_the_lock_has_a_hash_for_everything_and_names_no_host_or_folder() -> None:
    text = LOCK.read_text()
    requirements = re.split(r"\n(?=[a-z0-9])", text)[1:]
    assert len(requirements) == len(locked())
    assert all("--hash=sha256:" in requirement for requirement in requirements)
    assert not re.search(r"://|file:|^-|\s/\w", text, flags=re.MULTILINE)

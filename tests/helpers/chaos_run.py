"""Small runs on four meshes for the chaos test: started by one command again and again, on a disk of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from helpers.forked_verbs import ForkedVerb, start_verb
from helpers.small import read_state
from helpers.small_disk import DiskOfProcess, why_no_mount
from helpers.tiny import tiny_model

TIMEOUT_S = 300.0  # of everything that must happen
POLL_S = 0.02
NAME = "run"
# Everything that a state can hold: dropout, drop path, mixup, a moving average; a checkpoint every four steps.
CONFIG = """
name: run
data: {root: data, train: train.txt, val: val.txt, global_batch_size: 8, num_threads: 1, num_readers: 1}
augment: {mixup_alpha: 0.2}
optim: {ema_decay: 0.9, clip_norm: 1.0}
eval: {every_epochs: 1000}
checkpoint: {every_steps: 4}
log: {every_steps: 1}
"""


@dataclass(frozen=True)
class Mesh:
    """A mesh, and the length of its run, in which several faults have room."""

    num_ranks: int
    parallel: str
    depth: int = 1
    num_steps: int = 24

    def config(self) -> str:
        """Return the config of a run, as YAML."""
        model = tiny_model(depth=self.depth, dropout=0.1, drop_path_rate=0.1, drop_path_schedule="constant")
        return f"{model}{CONFIG}parallel: {self.parallel}\ntrain: {{epochs: 1000, max_steps: {self.num_steps}}}\n"


MESHES = {
    "one process": Mesh(1, "{}", num_steps=60),
    "dp 2": Mesh(2, "{dp: 2}"),
    "pp 2": Mesh(2, "{dp: 1, pp: 2, grad_accum_steps: 2}", depth=2),
    "ZeRO 3": Mesh(2, "{dp: 2, sharding_stage: 3}"),
}


class Disk:
    """A file system of 16 MB on a folder, which exists as long as this object and only for processes that enter it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        script = 'mount -t tmpfs -o size=16m none "$0" && echo mounted && exec cat'
        self._holder = subprocess.Popen(  # ends with this process, which closes the pipe
            ["unshare", "-rm", "sh", "-c", script, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout.readline() == b"mounted\n"
        self.folder = folder
        self.content = DiskOfProcess(self._holder.pid, folder)

    def enter_code(self) -> str:
        """Return Python code by which a process without other threads sees this disk (setns(2))."""
        return (
            "import ctypes, os\n"
            "cwd, libc = os.getcwd(), ctypes.CDLL(None, use_errno=True)\n"
            "for name in ('user', 'mnt'):\n"
            f"    namespace = os.open(f'/proc/{self._holder.pid}/ns/{{name}}', os.O_RDONLY)\n"
            "    assert libc.setns(namespace, 0) == 0, os.strerror(ctypes.get_errno())\n"
            "    os.close(namespace)\n"
            "os.chdir(cwd)\n"
        )

    def mount_read_only(self) -> None:
        """Make the folder read-only, except for files that are open already, which a plain remount would refuse."""
        self._run('mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"')

    def mount_writable(self) -> None:
        """Undo `mount_read_only`."""
        self._run('umount "$0"')

    def _run(self, script: str) -> None:
        enter = ["nsenter", "--preserve-credentials", "-U", "-m", "-t", str(self._holder.pid)]
        subprocess.run([*enter, "sh", "-c", script, self.folder], check=True)

    def close(self) -> None:
        self.content.close()
        self._holder.kill()
        self._holder.communicate()


class ChaosRun:
    """A command that trains, in a folder with a copy of the data; `start` gives it again after each end."""

    def __init__(self, folder: Path, mesh: Mesh, images: Path) -> None:
        folder.mkdir()
        self.folder, self.mesh, self._images = folder, mesh, images
        self.data = folder / "data"
        self.restore_data()
        (folder / "run.yaml").write_text(mesh.config())
        self.disk = None if why_no_mount() else Disk(folder / "output")
        self.output_dir = self.disk.content.path if self.disk else folder / "output"
        self.ranks: list[psutil.Process] = []
        self._verb: ForkedVerb | None = None
        self._stdout, self._pipe = b"", (-1, -1)
        self._expected_start = b""  # what the start screen says of it
        self._start_step = 0
        self._num_records_before = self._stderr_before = 0

    # -- the command ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Give the command."""
        self._close_pipe()
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[0], False)
        checkpoint = self.newest_checkpoint()
        self._start_step = 0 if checkpoint is None else int(checkpoint.name[5:])
        self._expected_start = b"fresh weights" if checkpoint is None else f"/{checkpoint.name}".encode()
        self._stdout, self.ranks = b"", []
        self._num_records_before = self._num_records()
        self._stderr_before = self._stderr_path.stat().st_size if self._stderr_path.exists() else 0
        self._verb = self._start_verb(Path(f"/proc/{os.getpid()}/fd/{self._pipe[1]}"))

    def start_second(self) -> ForkedVerb:
        """Give the command once more, while it runs. It waits half a second for the first one's end."""
        wait_less = "from vit_static.train import run_dir; run_dir.LOCK_WAIT_S = 0.5"
        return self._start_verb(self.folder / "second", wait_less)

    def _start_verb(self, stdout: Path, before: str = "") -> ForkedVerb:
        code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n" + CLOCK.format(file=self.clock_file)
        code += (self.disk.enter_code() if self.disk else "") + before
        if self.mesh.num_ranks > 1:
            code += LAUNCH.format(num_processes=self.mesh.num_ranks)
        return start_verb(["pretrain", "-c", "run.yaml"], self.folder, stdout, self._stderr_path, code)

    @property
    def launcher_id(self) -> int:
        """The process ID of the command; on one process that of its only rank."""
        assert self._verb is not None
        return self._verb.process_id

    def poll(self) -> int | None:
        """Return the exit code of the command, None while it runs; also take note of its output and its ranks."""
        if self._verb is None:
            return None
        code = self._verb.exit_code
        if self._pipe[0] >= 0:
            with suppress(BlockingIOError):
                self._stdout += os.read(self._pipe[0], 1 << 20)
        if code is None and len(self.ranks) < self.mesh.num_ranks:
            self.ranks = find_ranks(self.launcher_id, self.mesh.num_ranks)
        return code

    @property
    def has_started(self) -> bool:
        return self._verb is not None

    @property
    def is_running(self) -> bool:
        return self._verb is not None and self.poll() is None

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds or the command ends."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.poll() is None and not condition():
            assert time.monotonic() < deadline, f"no {what} within {TIMEOUT_S:.0f} s"
            time.sleep(POLL_S)

    def wait_for_steps(self, num_steps: int) -> None:
        """Wait until this many more steps have been logged, or the command ends. Checks where it has started."""
        target = self.num_steps_logged() + num_steps
        self.wait_for(lambda: self.num_steps_logged() >= target, f"{num_steps} steps")
        self.check_start()

    def wait_for_end(self) -> int:
        """Wait until the command and all of its ranks have ended; return its exit code."""
        self.wait_for(lambda: False, "end")
        _, running = psutil.wait_procs(self.ranks, TIMEOUT_S)
        assert not running, f"ranks outlive the command: {running}"
        code = self.poll()
        assert code is not None
        self.check_start()
        return code

    def close_stdout(self) -> None:
        """Close the reading end of standard output."""
        self.poll()
        os.close(self._pipe[0])
        self._pipe = (-1, self._pipe[1])

    def close(self) -> None:
        """Kill what still runs, and remove the disk."""
        if self.is_running:
            for process in (psutil.Process(self.launcher_id), *self.ranks):
                if process.is_running():
                    process.kill()
            self.wait_for_end()
        self._close_pipe()
        if self.disk:
            self.disk.close()

    def _close_pipe(self) -> None:
        for descriptor in self._pipe:
            if descriptor >= 0:
                os.close(descriptor)
        self._pipe = (-1, -1)

    # -- what it has written -------------------------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        return self.output_dir / NAME

    @property
    def metrics_file(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    @property
    def clock_file(self) -> Path:
        """The file whose number of bytes is the number of days by which the clock has jumped."""
        return self.folder / "days"

    @property
    def _stderr_path(self) -> Path:
        return self.folder / "stderr"

    def stderr(self) -> str:
        """Return what the command has written to standard error since it was last given."""
        return self._stderr_path.read_bytes()[self._stderr_before :].decode() if self._stderr_path.exists() else ""

    def output(self) -> str:
        """Return everything that the command has printed since it was last given."""
        self.poll()
        return self._stdout.decode(errors="replace") + self.stderr()

    def _num_records(self) -> int:
        """Return how many steps metrics.jsonl has, over all starts."""
        return self.metrics_file.read_bytes().count(b'"kind": "train"') if self.metrics_file.exists() else 0

    def num_steps_logged(self) -> int:
        """Return how many steps the command has logged since it was last given, in the file or the terminal."""
        return max(self._num_records() - self._num_records_before, self._stdout.count(b"images/s"))

    @property
    def step(self) -> int:
        """The number of steps that the run has done, as far as it has logged them."""
        return self._start_step + self.num_steps_logged()

    def check_start(self) -> None:
        """Check that the command, once it has trained, has started from the newest checkpoint that there was."""
        if b"images/s" in self._stdout:
            assert self._expected_start in self._stdout, f"has not started from {self._expected_start!r}"

    def newest_checkpoint(self) -> Path | None:
        """Return the folder of the newest checkpoint."""
        return max((self.run_dir / "checkpoints").glob("step_*"), default=None)

    def weights(self) -> dict[str, np.ndarray]:
        """Return the arrays of the merged weights and of their moving average."""
        files = ("model.pdparams", "model_ema.pdparams")
        return {f"{file} {key}": value for file in files for key, value in read_state(self.run_dir / file).items()}

    # -- its data ------------------------------------------------------------------------------------------------------

    def restore_data(self) -> None:
        """Undo all changes of the data, so that it is a fresh copy, with list files."""
        shutil.rmtree(self.data, ignore_errors=True)
        shutil.copytree(self._images, self.data)
        for split in ("train", "val"):
            paths = sorted((self.data / split).glob("*/*"))
            labels = {name: label for label, name in enumerate(sorted({path.parent.name for path in paths}))}
            lines = [f"{path.relative_to(self.data)} {labels[path.parent.name]}\n" for path in paths]
            (self.data / f"{split}.txt").write_text("".join(lines))


# Instead of the verb in this process: the launcher, with this many workers.
LAUNCH = """
import os, sys
from helpers.forked_launch import run_module
kept = {{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PADDLE_"))}}
others = {{"NPROC": "{num_processes}", "VIT_STATIC_DEVICE": "cpu"}}
run_module("vit_static.launch", sys.argv[1:], kept | others)
"""
# The time of day as the program reads it, which can't be set for one process alone: a file says by how many days it is
# wrong. Clocks for durations (CLOCK_MONOTONIC) don't jump.
CLOCK = """
import os, time
def jumping(read=time.time, file="{file}"):
    return read() + (86400 * os.stat(file).st_size if os.path.exists(file) else 0)
time.time = jumping
"""


def find_ranks(launcher_id: int, num_ranks: int) -> list[psutil.Process]:
    """Return the processes of the ranks, in their order, or none of them if they haven't all started."""
    try:
        process = psutil.Process(launcher_id)
        ranks = [process] if num_ranks == 1 else sorted(process.children(), key=lambda child: child.pid)
    except psutil.NoSuchProcess:
        return []
    return ranks if len(ranks) == num_ranks else []

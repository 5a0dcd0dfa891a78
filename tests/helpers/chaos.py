"""The kinds of faults of the chaos test: how each is made, how the command may end, and what a person repairs then.

All are real, on the processes and files of a run, except for the clock, which can't be set for one process: what
`time.time` returns jumps (helpers/chaos_run.py).
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from helpers.chaos_run import MESHES, ChaosRun

DONE, FAILED, MISTAKE, STOPPED = 0, 1, 2, 75
GOES_ON = None  # instead of an exit code


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    `ends`: the exit codes with which the command may end, GOES_ON if it needn't; a negative one is that of a signal.
    `message`: one of these is printed where the command ends with exit code 1 or 2.
    `refusal`: before the repair, the same command ends with exit code 2 and this message.
    """

    inject: Callable[[ChaosRun, random.Random], None]
    ends: tuple[int | None, ...]
    repair: Callable[[ChaosRun], None] = lambda run: None
    message: tuple[str, ...] = ()
    refusal: str = ""
    meshes: tuple[str, ...] = tuple(MESHES)
    needs_disk: bool = False  # of its own
    needs_checkpoint: bool = False
    in_startup: bool = False  # strikes at any moment of the start, not in a step
    may_trace: bool = False  # no message is defined, so that a traceback may be printed

    def may_strike(self, mesh: str) -> bool:
        return mesh in self.meshes


# -- signals -----------------------------------------------------------------------------------------------------------


def send(process: psutil.Process, number: int) -> None:
    """Send a signal to a process, unless it has ended."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def signal_to_command(number: int) -> Callable[[ChaosRun, random.Random], None]:
    """Return a fault that sends a signal to the command: to the launcher, or to the only process."""

    def inject(run: ChaosRun, _: random.Random) -> None:
        send(psutil.Process(run.launcher_id), number)

    return inject


def kill_rank(run: ChaosRun, rng: random.Random) -> None:
    """Send SIGKILL to one rank."""
    send(rng.choice(run.ranks), signal.SIGKILL)


def kill_all(run: ChaosRun, _: random.Random) -> None:
    """Send SIGKILL to the launcher and all ranks, as a machine that loses power."""
    for process in (psutil.Process(run.launcher_id), *run.ranks):
        send(process, signal.SIGKILL)


def stop_and_continue(run: ChaosRun, rng: random.Random) -> None:
    """Stop one rank, or all of them, for up to three seconds."""
    stopped = rng.choice([[rng.choice(run.ranks)], run.ranks])
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in stopped:
            send(process, number)
        if number == signal.SIGSTOP:
            time.sleep(rng.uniform(0.2, 3.0))


def terminate_twice(run: ChaosRun, rng: random.Random) -> None:
    """Send SIGTERM twice, within a second or later."""
    process = psutil.Process(run.launcher_id)
    send(process, signal.SIGTERM)
    time.sleep(rng.uniform(0.0, 1.5))
    send(process, signal.SIGTERM)


# -- disks and files ---------------------------------------------------------------------------------------------------


def fill_disk(run: ChaosRun, _: random.Random) -> None:
    """Leave no free byte on the disk of the output folder."""
    run.disk.content.fill()


def fill_disk_for_a_while(run: ChaosRun, rng: random.Random) -> None:
    """Fill the disk of the output folder, and free it after up to a second."""
    run.disk.content.fill()
    time.sleep(rng.uniform(0.1, 1.0))
    run.disk.content.free()


def free_disk(run: ChaosRun) -> None:
    run.disk.content.free()


def make_read_only(run: ChaosRun, _: random.Random) -> None:
    """Mount the output folder's disk read-only."""
    run.disk.mount_read_only()


def make_writable(run: ChaosRun) -> None:
    run.disk.mount_writable()


def close_stdout(run: ChaosRun, _: random.Random) -> None:
    """Let the reader of standard output leave."""
    run.close_stdout()


def delete_output(run: ChaosRun, _: random.Random) -> None:
    """Delete the run's folder."""
    while run.run_dir.exists():  # files may be created meanwhile
        shutil.rmtree(run.run_dir, ignore_errors=True)


def delete_output_of_killed(run: ChaosRun, rng: random.Random) -> None:
    """Kill all processes, and delete the run's folder."""
    kill_all(run, rng)
    run.wait_for_end()
    delete_output(run, rng)


def damage_checkpoint(run: ChaosRun, rng: random.Random) -> None:
    """Kill all processes, and cut off a file of the newest checkpoint."""
    kill_all(run, rng)
    run.wait_for_end()
    file = rng.choice(sorted(path for path in run.newest_checkpoint().iterdir() if path.stat().st_size))
    os.truncate(file, rng.randrange(file.stat().st_size))


def remove_checkpoint(run: ChaosRun) -> None:
    shutil.rmtree(run.newest_checkpoint())


def cut_off_metrics(run: ChaosRun, rng: random.Random) -> None:
    """Kill all processes, and cut off metrics.jsonl within a line, as a file system does that loses power."""
    kill_all(run, rng)
    run.wait_for_end()
    os.truncate(run.metrics_file, rng.randrange(1, run.metrics_file.stat().st_size))


def truncate_images(run: ChaosRun, rng: random.Random) -> None:
    """Cut off many of the training images."""
    for file in sorted((run.data / "train").glob("*/*")):
        if rng.random() < 0.5:
            os.truncate(file, file.stat().st_size // 2)


def remove_images(run: ChaosRun, rng: random.Random) -> None:
    """Remove many of the training images."""
    for file in sorted((run.data / "train").glob("*/*")):
        if rng.random() < 0.5:
            file.unlink()


def remove_data(run: ChaosRun, _: random.Random) -> None:
    """Take away the folder with all data, as a disk that is unmounted."""
    run.data.rename(run.folder / "elsewhere")


def return_data(run: ChaosRun) -> None:
    (run.folder / "elsewhere").rename(run.data)


def edit_list(run: ChaosRun, rng: random.Random) -> None:
    """Kill all processes, and swap two lines of the list of training images, or remove one."""
    kill_all(run, rng)
    run.wait_for_end()
    path = run.data / "train.txt"
    lines = path.read_text().splitlines(keepends=True)
    first, second = rng.sample(range(len(lines)), 2)
    if rng.random() < 0.5:
        lines[first], lines[second] = lines[second], lines[first]
    else:
        del lines[first]
    path.write_text("".join(lines))


# -- clock, limits, and a second command -------------------------------------------------------------------------------


def jump_clock(run: ChaosRun, rng: random.Random) -> None:
    """Let the clock jump ahead by up to 30 years, or back; date all files of the run from before or after that."""
    days = rng.randrange(1, 11_000)
    if run.clock_file.exists():
        run.clock_file.unlink()
    else:
        run.clock_file.touch()
        os.truncate(run.clock_file, days)
    for file in run.run_dir.rglob("*"):
        with suppress(FileNotFoundError):  # removed meanwhile
            os.utime(file, (0, 86400 * rng.choice((1, 2 * days, 40_000))), follow_symlinks=False)


def limit(kind: int, number: Callable[[psutil.Process, random.Random], int]) -> Callable[..., None]:
    """Return a fault that lowers a limit of one running rank (prlimit(2)) to the number that a function returns."""

    def inject(run: ChaosRun, rng: random.Random) -> None:
        rank = rng.choice(run.ranks)
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            resource.prlimit(rank.pid, kind, (number(rank, rng), resource.prlimit(rank.pid, kind)[1]))

    return inject


def lift(kind: int) -> Callable[[ChaosRun], None]:
    """Return the repair of a limit: that of all ranks is as high as it may be."""

    def repair(run: ChaosRun) -> None:
        for rank in run.ranks:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                hard = resource.prlimit(rank.pid, kind)[1]
                resource.prlimit(rank.pid, kind, (hard, hard))

    return repair


def start_second(run: ChaosRun, _: random.Random) -> None:
    """Give the same command while it runs: it is refused, or finds the run ended."""
    second = run.start_second()
    code = second.wait(300.0)
    assert code == DONE or (code == MISTAKE and "another run is using this folder" in run.stderr())


SEVERAL = tuple(name for name, mesh in MESHES.items() if mesh.num_ranks > 1)
ONE = tuple(name for name, mesh in MESHES.items() if mesh.num_ranks == 1)
NO_ROOM, READ_ONLY = "No space left on device", "Read-only file system"
LIMITED = (GOES_ON, DONE, FAILED, MISTAKE)

KINDS = {
    "one rank is killed": Fault(kill_rank, (-9, FAILED), may_trace=True),
    "all processes are killed": Fault(kill_all, (-9,)),
    "all processes are killed during the start": Fault(kill_all, (-9,), in_startup=True),
    "the launcher is killed": Fault(signal_to_command(signal.SIGKILL), (-9,), meshes=SEVERAL),
    "SIGTERM": Fault(signal_to_command(signal.SIGTERM), (STOPPED,)),
    # Before the process's first statement the signal has its default effect.
    "SIGTERM during the start": Fault(signal_to_command(signal.SIGTERM), (STOPPED, -signal.SIGTERM), in_startup=True),
    "SIGTERM twice": Fault(terminate_twice, (STOPPED, 128 + signal.SIGTERM, FAILED), may_trace=True),
    "SIGHUP": Fault(signal_to_command(signal.SIGHUP), (STOPPED,)),
    "Ctrl-C": Fault(signal_to_command(signal.SIGINT), (STOPPED,)),
    "stopped and continued": Fault(stop_and_continue, (GOES_ON, DONE)),
    "a full disk for a while": Fault(fill_disk_for_a_while, (GOES_ON, DONE, FAILED), needs_disk=True),
    "a full disk": Fault(fill_disk, (FAILED,), free_disk, (NO_ROOM,), needs_disk=True),
    "a disk that becomes read-only": Fault(
        make_read_only, (FAILED, MISTAKE), make_writable, (READ_ONLY,), READ_ONLY, needs_disk=True
    ),
    "a reader of stdout that leaves": Fault(close_stdout, (GOES_ON, DONE)),
    "the output folder is deleted": Fault(delete_output, (FAILED, MISTAKE, DONE)),
    "the output folder of a killed run is deleted": Fault(delete_output_of_killed, (-9,)),
    "a damaged checkpoint": Fault(
        damage_checkpoint, (-9,), remove_checkpoint, refusal="checkpoints/step_", needs_checkpoint=True
    ),
    "metrics.jsonl is cut off": Fault(cut_off_metrics, (-9,)),
    "truncated images": Fault(truncate_images, (MISTAKE, GOES_ON, DONE), ChaosRun.restore_data, ("data/train/",)),
    "removed images": Fault(remove_images, (MISTAKE, GOES_ON, DONE), ChaosRun.restore_data, ("data/train/",)),
    "the data is gone": Fault(remove_data, (MISTAKE,), return_data, ("No such file",), "data/train.txt"),
    "an edited list": Fault(
        edit_list, (-9,), ChaosRun.restore_data, refusal="cannot resume with a different data", needs_checkpoint=True
    ),
    "the clock jumps": Fault(jump_clock, (GOES_ON, DONE)),
    "no more files may be opened": Fault(
        limit(resource.RLIMIT_NOFILE, lambda _, rng: rng.randrange(3, 200)), LIMITED, lift(resource.RLIMIT_NOFILE)
    ),
    "files may not grow": Fault(
        limit(resource.RLIMIT_FSIZE, lambda _, rng: rng.randrange(4000)), LIMITED, lift(resource.RLIMIT_FSIZE)
    ),
    "no more memory": Fault(
        limit(resource.RLIMIT_AS, lambda rank, rng: rank.memory_info().vms + rng.randrange(1 << 23)),
        (*LIMITED, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGKILL),
        lift(resource.RLIMIT_AS),
        may_trace=True,
    ),
    "the time on the CPU is used up": Fault(
        limit(resource.RLIMIT_CPU, lambda _, __: 1), (-signal.SIGXCPU, FAILED), may_trace=True
    ),
    "the command is given twice": Fault(start_second, (GOES_ON, DONE), meshes=ONE),
}


def plan(seed: int, num_faults: int) -> dict[str, list[str]]:
    """Return the kinds that strike on each mesh, in random order: most on one process, a seventh on each other mesh.

    Kinds don't repeat before all of them have been used.
    """
    rng = random.Random(seed)
    num_on_several = max(num_faults // 7, 1)
    numbers = dict.fromkeys(SEVERAL, num_on_several)
    numbers |= {name: num_faults - num_on_several * len(SEVERAL) for name in ONE}
    plans: dict[str, list[str]] = {name: [] for name in MESHES}
    deck: list[str] = []
    while any(len(plans[name]) < numbers[name] for name in MESHES):
        for name in (*SEVERAL, *ONE):
            if len(plans[name]) < numbers[name]:
                if not any(KINDS[kind].may_strike(name) for kind in deck):
                    deck += rng.sample(list(KINDS), len(KINDS))
                kind = next(kind for kind in deck if KINDS[kind].may_strike(name))
                deck.remove(kind)
                plans[name].append(kind)
    return plans

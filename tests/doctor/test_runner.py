"""The command: every check on a CPU, on one process and on two; faults, crashes and hangs in single checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.doctor import Doctor

from vit_static.doctor import record
from vit_static.doctor.checks import CHECKS
from vit_static.doctor.subject import Job

GPU_ONLY = {"driver", "capability", "streams", "dropout", "loss-scale"}
SEVERAL_RANKS = {"all-reduce", "zero"}
DIES = "    import os, signal, sys\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
LINEAR = "def check_linear(subject: Subject) -> Result:\n"
ATTENTION = "def check_attention(subject: Subject) -> Result:\n"


@pytest.mark.slow
def test_all_checks_pass_on_a_cpu_and_the_pass_is_recorded(doctor: Doctor) -> None:
    report = doctor()
    assert report.code == 0, report.lines
    assert list(report.checks) == [check.name for check in CHECKS]
    for name, check in report.checks.items():
        applies = name not in GPU_ONLY | SEVERAL_RANKS
        assert check["status"] == ("ok" if applies else "skipped"), check
        assert report.line(name).startswith("ok " if applies else "- ")
    assert report.checks["speed"]["figures"]["images_per_s"] > 0.0
    assert report.checks["ten-steps"]["figures"]["losses"][0] > report.checks["ten-steps"]["figures"]["losses"][-1]
    (entry,) = json.loads((doctor.folder / "cache/vit_static/doctor.json").read_text())["passes"]
    assert entry["setting"]["paddle"] == record.paddle_version()


@pytest.mark.slow
def test_two_processes_also_check_what_they_exchange(doctor: Doctor) -> None:
    report = doctor("-o", "parallel.sharding_stage=2", NPROC="2")
    assert report.code == 0, report.lines
    skipped = {name for name, check in report.checks.items() if check["status"] == "skipped"}
    assert skipped == GPU_ONLY
    assert report.checks["mesh"]["figures"]["world_size"] == 2
    assert report.checks["all-reduce"]["figures"]["bus_gb_per_s"] > 0.0


def test_a_crash_or_a_hang_is_a_line_and_the_other_checks_go_on(doctor: Doctor) -> None:
    hangs = "    import signal, time\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    time.sleep(1000)\n"
    doctor.break_package("doctor/kernels.py", ATTENTION, ATTENTION + DIES)
    doctor.break_package("doctor/kernels.py", LINEAR, LINEAR + hangs)
    doctor.break_package("doctor/check.py", "timeout_s: float = 120.0", "timeout_s: float = 15.0")
    report = doctor(only=("mesh", "attention", "linear", "elementwise"))
    assert report.code == 1
    assert [check["status"] for check in report.checks.values()] == ["ok", "failed", "failed", "ok"]
    line = report.line("attention")
    assert "the process was killed by SIGSEGV" in line and "-o kernels.onednn=false" in line
    assert "no answer within 15 s" in report.line("linear")
    assert not (doctor.folder / "cache/vit_static/doctor.json").exists()


@pytest.mark.slow
def test_what_happens_to_one_of_two_ranks_ends_the_check_on_both(doctor: Doctor) -> None:
    """In an all-reduce the other rank waits for the one that has failed."""
    on_rank_1 = DIES.replace("    os.kill", "    if os.environ['PADDLE_TRAINER_ID'] == '1':\n        os.kill")
    doctor.break_package("doctor/kernels.py", ATTENTION, ATTENTION + on_rank_1)
    first = "    mesh = subject.mesh\n    bucket = make_bucket(subject)\n    total = bucket.clone()\n"
    fails = "    if mesh.rank == 1:\n        raise RuntimeError('no connection')\n"
    doctor.break_package("doctor/collectives.py", first, first + fails)
    report = doctor(only=("mesh", "all-reduce", "attention", "elementwise"), NPROC="2")
    assert report.code == 1
    assert [check["status"] for check in report.checks.values()] == ["ok", "failed", "failed", "ok"]
    assert "rank 1: RuntimeError: no connection; GLOO_SOCKET_IFNAME" in report.line("all-reduce")
    assert "rank 1 was killed by signal 11" in report.line("attention")


def test_processes_that_do_not_start_are_reported_once(doctor: Doctor) -> None:
    doctor.break_package("doctor/worker.py", "    job = Job.read(folder)\n", "    raise SystemExit(3)\n")
    report = doctor(only=("versions", "attention", "linear"))
    assert [check["status"] for check in report.checks.values()] == ["failed"] * 3
    assert all("its process doesn't start: the process ended with exit code 3" in line for line in report.lines[1:4])


def test_checks_that_need_a_failed_one_are_left_out(doctor: Doctor) -> None:
    start = '    """All ranks connect, on the device and on the host."""\n'
    doctor.break_package("doctor/collectives.py", start, start + "    raise OSError('no network')\n")
    report = doctor(only=("mesh", "attention", "speed"))
    assert [check["status"] for check in report.checks.values()] == ["failed", "ok", "skipped"]
    assert "needs mesh" in report.line("speed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "model.widht=3"), "model.widht is not a key; did you mean model.width?"),
        (("-o", "device=gpu"), "device = 'gpu': this machine has no GPU"),
        (("--only", "kernels"), "--only kernels: is not a check; the checks are versions, imports, "),
        (("--json", "missing/results.json"), "there is no folder missing"),
    ],
)
def test_a_mistake_is_one_line(doctor: Doctor, arguments: tuple[str, ...], message: str) -> None:
    report = doctor(*arguments)
    assert report.code == 2
    assert message in report.stderr and len(report.stderr.splitlines()) == 1


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    job = Job(("mesh", "data"), ("versions",), 8, 4)
    job.write(tmp_path)
    assert Job.read(tmp_path) == job

"""The verb `doctor`: has processes perform the checks, and reports one line per check.

This process imports no Paddle and touches no GPU. Kernels may end a process or hang, so every check runs in another
one: the checks of a group share processes as long as all goes well. When one dies, hangs or fails, its check is
reported, and new processes perform the group's other checks.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_static.bench.harness import check_writable
from vit_static.common.errors import UserError
from vit_static.common.io import write_json
from vit_static.common.terminal import print_wrapped
from vit_static.common.text import counted, duration, print_line
from vit_static.config.schema import Config
from vit_static.doctor import record
from vit_static.doctor.check import Result
from vit_static.doctor.checks import BY_NAME, CHECKS, GROUPS
from vit_static.doctor.gpus import visible_gpus
from vit_static.doctor.processes import Outcome, Request, started_processes
from vit_static.doctor.subject import NUM_BLOCKS
from vit_static.launch.topology import find_layout
from vit_static.model.variants import largest_train_size, require_head, variant_of

_SHOWN = {"ok": "ok", "failed": "FAILED", "skipped": "-"}
_STYLES = {"ok": "green", "FAILED": "bold red", "-": "dim"}


def run(
    config: Config,
    config_path: Path,
    overrides: Sequence[str],
    *,
    only: Sequence[str] = (),
    json_path: Path | None = None,
    verbose: bool = False,
) -> bool:
    """Perform all checks, or `only` those with these names; print one line each, and return whether none failed.

    When all have passed, that is recorded, so that a run on the same GPUs starts without a notice. The processes'
    output is kept if a check fails. Raises UserError for a config that this machine or this number of processes can't
    run.
    """
    check_writable(json_path)
    require_head(config.model)
    names = _selected(only)
    world_size, num_local = _world_size(config)
    request = Request(config, config_path, overrides, names, world_size, num_local, verbose)
    started = time.monotonic()
    print_wrapped(_headline(request), 2)
    outcomes: list[Outcome] = []
    folder = Path(tempfile.mkdtemp(prefix="vit_static_doctor_"))
    try:
        for outcome in perform_all(request, folder):
            print_wrapped(_line(outcome), 20, _STYLES)
            outcomes.append(outcome)
    finally:
        if all(outcome.result.status != "failed" for outcome in outcomes):
            shutil.rmtree(folder, ignore_errors=True)
    num = {status: sum(outcome.result.status == status for outcome in outcomes) for status in _SHOWN}
    seconds = time.monotonic() - started
    has_passed = num["failed"] == 0
    where = "" if has_passed else f"; what the processes printed is in {folder}"
    print_line(f"{duration(seconds)}: {num['ok']} ok, {num['failed']} failed, {num['skipped']} skipped{where}")
    setting = record.setting(config, world_size, visible_gpus())
    if has_passed and len(names) == len(CHECKS):
        record.write_pass(setting, config.name)
    if json_path is not None:
        write_json(_as_json(request, setting, outcomes, seconds), json_path)
    return has_passed


def _selected(only: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the checks to perform, in order. Raise UserError for an unknown name."""
    unknown = [name for name in only if name not in BY_NAME]
    if unknown:
        raise UserError(f"--only {unknown[0]}: is not a check; the checks are {', '.join(BY_NAME)}")
    return tuple(check.name for check in CHECKS if check.name in only or not only)


def _world_size(config: Config) -> tuple[int, int]:
    """Return the number of ranks of a run, and how many of them this launcher starts. Raise UserError as it does."""
    try:
        layout = find_layout(os.environ, config.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    return layout.num_nodes * layout.num_local, layout.num_local


def _headline(request: Request) -> str:
    config = request.config
    blocks = f"{counted(max(NUM_BLOCKS, config.parallel.pp), 'block')} instead of {variant_of(config.model).depth}"
    processes = counted(request.world_size, "process")
    checks = counted(len(request.names), "check")
    size, teacher = "", ""
    if len(config.train.image_sizes) > 1:
        height, width = largest_train_size(config.model, config.train)
        size = f" and images of {height}x{width}, the largest of train.image_sizes"
    if config.distill.teacher is not None:
        teacher = ", and so does the teacher, with random weights"
    return f"{config.name}: {checks} on {processes}; those that train use {blocks}{size}{teacher}"


def _line(outcome: Outcome) -> str:
    """Return a check's line for the user."""
    result = outcome.result
    remedy = f"; {result.remedy}" if result.remedy else ""
    return f"{_SHOWN[result.status]:<8}{outcome.name:<12}{result.message}{remedy}"


def _as_json(
    request: Request, setting: Mapping[str, Any], outcomes: Sequence[Outcome], seconds: float
) -> dict[str, Any]:
    return {
        "config": request.config.name,
        "passed": all(outcome.result.status != "failed" for outcome in outcomes),
        "setting": dict(setting),
        "seconds": seconds,
        "checks": [
            {"name": outcome.name, **outcome.result.as_json(), "seconds": outcome.seconds} for outcome in outcomes
        ],
    }


def perform_all(request: Request, folder: Path) -> Iterator[Outcome]:
    """Perform the requested checks group by group, and yield each outcome as it is known.

    The processes' output is written below `folder`. Raises UserError if a process refuses the config.
    """
    failed: list[str] = []
    for group in GROUPS:
        pending = [check.name for check in CHECKS if check.group == group and check.name in request.names]
        num_starts = 0
        while pending:
            attempt = folder / f"{group}_{num_starts}"
            num_starts += 1
            has_begun = False
            with started_processes(request, group, pending, failed, attempt) as processes:
                for outcome in processes.outcomes(pending):
                    has_begun = True
                    pending.remove(outcome.name)
                    failed += [outcome.name] if outcome.result.status == "failed" else []
                    yield outcome
            if not has_begun:  # so would the next processes
                message = f"its process doesn't start: {processes.reason_of_end}"
                for name in pending:
                    yield Outcome(name, Result("failed", message, "see the log"), 0.0)
                failed += pending
                pending = []

"""A process that performs checks: `doctor --worker FOLDER`, started by runner.py.

It appends an event per line to FOLDER/rank_N.jsonl: the process has started, or can't use the config on this machine,
or a check has started or has ended. After a failure the process ends, because a GPU whose kernel has failed may fail in
everything after it; the runner starts a new one for the checks that are left.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import paddle

from vit_static.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_MISTAKE, UserError
from vit_static.common.library_output import redirect_library_output
from vit_static.config.schema import Config
from vit_static.doctor.check import perform, remedy_of, skipped
from vit_static.doctor.checks import BY_NAME
from vit_static.doctor.subject import Job, Subject
from vit_static.parallel.mesh import rank_and_world_size


def work(config: Config, folder: Path) -> int:
    """Perform the checks of the folder's job, and return the exit code."""
    rank, _ = rank_and_world_size()
    job = Job.read(folder)
    redirect_library_output(folder / f"rank_{rank}.log")
    events = folder / f"rank_{rank}.jsonl"
    _write(events, pid=os.getpid())
    try:
        subject = Subject(config, job)
    except UserError as error:
        _write(events, refused=str(error))
        return EXIT_USER_MISTAKE
    paddle.set_device("cpu" if subject.device_id is None else f"gpu:{subject.device_id}")
    for name in job.checks:
        check = BY_NAME[name]
        missing = [other for other in check.needs if other in job.failed]
        if subject.is_connected:
            subject.mesh.all_gather_object(None)  # no rank is a check ahead of another when one fails
        _write(events, started=name, remedy=remedy_of(check, subject))
        started = time.perf_counter()
        result = skipped(f"needs {' and '.join(missing)}") if missing else perform(check, subject)
        _write(events, ended=name, result=result.as_json(), seconds=time.perf_counter() - started)
        if result.status == "failed":
            return EXIT_FAILED
    return EXIT_DONE


def _write(events: Path, **event: Any) -> None:
    with events.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event, default=str) + "\n")

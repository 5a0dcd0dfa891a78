"""Random faults strike runs on four meshes; the same command resumes after each, to the same bits.

`CHAOS_FAULTS=100 CHAOS_SEED=7 ./run.sh test tests/train/test_chaos.py`: 100 faults instead of ten, drawn with another
seed. A failure names the seed, the kind and the moment. (Given these, kinds, steps and what is damaged are the same
again; which operation of a step is hit depends on the machine.)
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.chaos import DONE, FAILED, GOES_ON, KINDS, MISTAKE, Fault, plan
from helpers.chaos_run import MESHES, ChaosRun
from helpers.small_disk import why_no_mount

pytestmark = [pytest.mark.reliability, pytest.mark.slow]

NUM_FAULTS, SEED = int(os.environ.get("CHAOS_FAULTS", "10")), int(os.environ.get("CHAOS_SEED", "1"))
MARGIN = 6  # steps before the end of a run in which a new fault would come too late


class Chaos:
    """Strikes runs on one mesh, a new one whenever one has ended with the weights of the uninterrupted run."""

    def __init__(self, folder: Path, mesh: str, images: Path, rng: random.Random) -> None:
        self.folder, self.mesh, self.images, self.rng = folder, MESHES[mesh], images, rng
        self.num_runs, self.moment = 0, ""
        self.run = self.new_run()
        self.run.start()
        assert self.run.wait_for_end() == DONE, self.run.output()
        self.expected = self.run.weights()
        self.next_run()

    def new_run(self) -> ChaosRun:
        self.num_runs += 1
        return ChaosRun(self.folder / f"run{self.num_runs}", self.mesh, self.images)

    def next_run(self) -> None:
        self.run.close()
        self.run = self.new_run()

    def strike(self, fault: Fault) -> None:
        """Let a fault strike in a step, or while the command starts; repair what it has done."""
        while not (self.reach(fault) and self.survive(fault)):
            self.finish()
        if self.run.poll() == DONE:
            self.finish()

    def survive(self, fault: Fault) -> bool:
        """Return False if the fault came too late to have an effect."""
        run, rng = self.run, self.rng
        self.moment = f"{run.num_steps_logged()} steps after a start"
        fault.inject(run, rng)
        run.poll()
        was_last_step = run.step >= self.mesh.num_steps - 1
        if GOES_ON in fault.ends:
            run.wait_for_steps(rng.randrange(3, 8))
            code = run.poll()
        else:
            code = run.wait_for_end()
        is_late = was_last_step and code == DONE
        if code != GOES_ON and not is_late:
            self.check_end(fault, run.wait_for_end())
            if fault.refusal and code != DONE:
                self.check_refusal(fault)
        fault.repair(run)
        if code == GOES_ON:
            run.wait_for_steps(2)
            if not run.is_running:
                self.check_end(fault, run.wait_for_end())
        print(f"{self.moment}: exit code {code}")
        return not is_late or DONE in fault.ends

    def reach(self, fault: Fault) -> bool:
        """Wait for a random moment; return False if the run is about to end, or has ended, before."""
        run, rng = self.run, self.rng
        if fault.in_startup and run.is_running:
            os.kill(run.launcher_id, signal.SIGTERM)
            run.wait_for_end()
        if run.poll() == DONE:
            return False
        if not run.is_running:
            run.start()
        if fault.in_startup:
            run.wait_for(lambda: bool(run.ranks), "ranks")
            time.sleep(rng.uniform(0.0, 2.0))
        else:
            run.wait_for(lambda: not fault.needs_checkpoint or run.newest_checkpoint() is not None, "checkpoint")
            run.wait_for_steps(rng.randrange(2, 7))
            time.sleep(rng.uniform(0.0, 0.05))
        return run.is_running and run.step < self.mesh.num_steps - MARGIN

    def check_end(self, fault: Fault, code: int) -> None:
        output = self.run.output()
        assert code in fault.ends, f"exit code {code}"
        assert fault.may_trace or "Traceback" not in output, "a traceback"
        if fault.message and code in (FAILED, MISTAKE):
            assert any(message in output for message in fault.message), f"none of {fault.message} is printed"

    def check_refusal(self, fault: Fault) -> None:
        self.run.start()
        code, output = self.run.wait_for_end(), self.run.output()
        assert code == MISTAKE and fault.refusal in output and "Traceback" not in output, f"not refused, but {code}"

    def finish(self) -> None:
        """Give the command until it is done, and compare the weights."""
        if self.run.poll() != DONE:
            if not self.run.is_running:
                self.run.start()
            code = self.run.wait_for_end()
            assert code == DONE, f"exit code {code}"
        weights = self.run.weights()
        assert weights.keys() == self.expected.keys()
        assert all(np.array_equal(weights[name], self.expected[name]) for name in self.expected), "other weights"
        self.next_run()


@pytest.mark.parametrize("mesh", MESHES)
def test_the_same_command_resumes_after_each_fault(
    mesh: str, tmp_path: Path, small_digits: Path, tally: Callable[..., None]
) -> None:
    rng = random.Random(f"{SEED} {mesh}")
    chaos = Chaos(tmp_path, mesh, small_digits, rng)
    name, survived = "nothing", []
    try:
        for name in plan(SEED, NUM_FAULTS)[mesh]:
            fault = KINDS[name]
            if fault.needs_disk and why_no_mount():
                tally(f"chaos: {name}", 1, "skipped")
                continue
            chaos.strike(fault)
            survived.append(name)
            tally(f"chaos: {name}")
        if chaos.run.has_started:
            chaos.finish()
    except Exception as error:
        place = f"CHAOS_FAULTS={NUM_FAULTS} CHAOS_SEED={SEED}, {mesh}, run {chaos.num_runs}, {len(survived)} faults"
        last_lines = "\n".join(chaos.run.output().splitlines()[-30:])
        raise AssertionError(f"{place}; then {name!r} {chaos.moment}: {error}\n{last_lines}") from error
    finally:
        chaos.run.close()
    for name in survived:
        tally(f"chaos: {name}", 1, "survived")


def test_kinds_repeat_only_after_all_have_been_used() -> None:
    assert len(KINDS) >= 15
    for num_faults in (10, 100):
        plans = plan(3, num_faults)
        kinds = [kind for planned in plans.values() for kind in planned]
        assert len(kinds) == num_faults and len(set(kinds)) == min(num_faults, len(KINDS))
        assert all(KINDS[kind].may_strike(mesh) for mesh, planned in plans.items() for kind in planned)
        assert all(plans.values())

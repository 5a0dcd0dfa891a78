"""A failing test leaves Paddle as it was before it: pytest in a process of its own, with this suite's conftest.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.small import ROOT

FAILING = """
import paddle, pytest

open_guards = []  # which the end of a test doesn't close

def enter(guard):
    open_guards.append(guard)
    guard.__enter__()

def test_fails_inside_open_guards():
    enter(paddle.static.scope_guard(paddle.static.Scope()))
    paddle.enable_static()
    enter(paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()))
    enter(paddle.amp.auto_cast(level="O1", dtype="bfloat16"))
    paddle.set_default_dtype("float64")
    raise AssertionError

@pytest.fixture(scope="module")
def failing():
    paddle.enable_static()
    raise AssertionError

def test_fails_in_a_fixture(failing):
    pass
"""
FOLLOWING = """
def test_creates_a_parameter():
    assert paddle.in_dynamic_mode()
    x = paddle.ones([4, 2])
    layer = paddle.nn.Linear(2, 3)
    layer(x).sum().backward()
    assert layer.weight.grad.tolist() == [[4.0] * 3] * 2
    assert not paddle.static.default_main_program().global_block().ops
    assert not paddle.static.default_startup_program().global_block().ops

def test_traces_in_float32():
    layer = paddle.jit.to_static(paddle.nn.Linear(2, 3), full_graph=True)
    assert layer(paddle.ones([4, 2])).dtype == paddle.float32
    program = layer.forward.concrete_program.main_program
    assert "pd_op.cast" not in [op.name() for op in program.global_block().ops]
"""


def test_a_failing_test_leaves_no_state_for_the_next(tmp_path: Path) -> None:
    (tmp_path / "test_inside.py").write_text(FAILING + FOLLOWING)
    options = ["-q", "-p", "conftest", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", str(ROOT / "setup.cfg")]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--rootdir={tmp_path}", str(tmp_path / "test_inside.py")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == pytest.ExitCode.TESTS_FAILED, finished.stdout + finished.stderr
    assert "1 failed, 2 passed" in finished.stdout and "1 error" in finished.stdout, finished.stdout

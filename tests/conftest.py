"""Shared fixtures and hooks: worker processes, process set-up, compiled programs, counts in the summary."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
from helpers import paddle_state
from helpers.bad_input import trial  # noqa: F401 - a fixture
from helpers.command_line import workplace  # noqa: F401 - a fixture
from helpers.exported import exported  # noqa: F401 - a fixture
from helpers.runs import finished, run, small_config  # noqa: F401 - fixtures
from helpers.sets import make_set, small_digits  # noqa: F401 - fixtures
from helpers.shards import shard_source  # noqa: F401 - a fixture

from vit_static.common.cpu import cpu_flags, cpu_has_bfloat16
from vit_static.common.errors import UserError
from vit_static.common.startup import prepare_process

MAX_WORKERS = 4
_TALLY = pytest.StashKey[dict[str, Counter[str]]]()
# Markers of tests that need an instruction set: whether this CPU has it, and the reason of a skip.
_CPU_NEEDS = {"needs_bfloat16": (cpu_has_bfloat16, "no AVX512-BF16 and no AMX")}
_SKIPPED_FOR = "this CPU, or the limit set for it, has "


@pytest.hookimpl(tryfirst=True)  # xdist's own reads the options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in one process more than there are cores, since many tests wait for processes of theirs.

    A selection of the tests runs in one process, and so does everything with a GPU, which they would share.
    """
    if hasattr(config, "workerinput") or not config.pluginmanager.hasplugin("xdist"):
        return
    option, num_cores = config.option, len(os.sched_getaffinity(0))
    is_whole = config.args_source == config.ArgsSource.TESTPATHS and not option.keyword and not option.markexpr
    has_gpu = os.environ.get("VIT_STATIC_DEVICE") == "gpu"
    if is_whole and option.numprocesses is None and num_cores > 1 and not option.usepdb and not has_gpu:
        option.numprocesses = min(num_cores + 1, MAX_WORKERS)
    if option.numprocesses and option.dist == "no":
        option.dist = "worksteal"  # tests of a file stay together unless a process would be idle


def pytest_configure(config: pytest.Config) -> None:
    """Set the process up before any test module imports Paddle; verbose, since pytest captures standard output."""
    is_worker = hasattr(config, "workerinput")
    try:
        cpu_flags()
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    if config.getoption("dist", "no") != "no" and not is_worker and not config.option.collectonly:
        return  # others run the tests
    os.environ.setdefault("GLOG_minloglevel", "2")
    if is_worker:
        num_cores = len(os.sched_getaffinity(0)) // config.workerinput["workercount"]  # type: ignore[attr-defined]
        os.environ.setdefault("OMP_NUM_THREADS", str(max(num_cores, 1)))
    prepare_process(verbose=True)
    _leave_out_origins_of_operators()


def _leave_out_origins_of_operators() -> None:
    """Don't let DALI store for each operator where it was created: below pytest's stack that takes half of the time to
    build a pipeline with RandAugment."""
    from nvidia.dali._utils import dali_trace

    dali_trace.set_tracing(enabled=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, bool | None, bool | None]:
    """Restore Paddle's state after each test: a failing one may leave static mode on or a guard open."""
    values = paddle_state.read()
    try:
        return (yield)
    finally:
        paddle_state.restore(values)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Freeze what the garbage collector knows: Paddle keeps 100,000 objects per program, visited by each collection."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import paddle

    # A worker takes its tests from the beginning of its share; an idle worker steals from the end.
    items.sort(key=lambda item: "early" not in item.keywords)
    for marker, (has_instructions, lack) in _CPU_NEEDS.items():
        marks: list[Any] = ["cpu_isa"]
        if not has_instructions():
            marks.append(pytest.mark.skip(reason=_SKIPPED_FOR + lack))
        for item in items:
            if marker in item.keywords:
                for mark in marks:
                    item.add_marker(mark)
    if sys.version_info >= (3, 13):  # on others, a missing package is a failure
        for item in items:
            if "needs_paddle2onnx" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="paddle2onnx has no build for this Python"))
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Callable[..., None]:
    """tally("kills survived"), tally("bad images", 3, "refused"): counts for pytest's summary, one row each."""
    rows = pytestconfig.stash.setdefault(_TALLY, {})

    def count(row: str, count: int = 1, column: str = "cases") -> None:
        rows.setdefault(row, Counter())[column] += count

    return count


@pytest.fixture
def signals_are_not_ignored() -> Iterator[None]:
    """Let SIGHUP and SIGINT have their usual effect here and in processes that a test starts.

    nohup ignores the first one, and a shell without job control the second one in what it starts in the background.
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip((signal.SIGHUP, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def count_case(request: pytest.FixtureRequest, tally: Callable[..., None]) -> Iterator[None]:
    """Count a test marked `reliability("row")` as a case of that row."""
    marker = request.node.get_closest_marker("reliability")
    yield
    if marker is not None and marker.args:
        tally(marker.args[0])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        rows = session.config.stash.get(_TALLY, {})
        session.config.workeroutput["tally"] = {row: dict(counts) for row, counts in rows.items()}


@pytest.hookimpl(optionalhook=True)  # without xdist there is none
def pytest_testnodedown(node: Any) -> None:
    rows = node.config.stash.setdefault(_TALLY, {})
    for row, counts in getattr(node, "workeroutput", {}).get("tally", {}).items():  # a worker that died has no output
        rows.setdefault(row, Counter()).update(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and _SKIPPED_FOR in report.longrepr[2]
    )
    for reason, num_tests in skipped.items():
        terminalreporter.write_line(f"{num_tests} tests skipped: {reason}")
    rows = terminalreporter.config.stash.get(_TALLY, {})
    if not rows:
        return
    columns = sorted(
        {column for counts in rows.values() for column in counts}, key=lambda name: (name != "cases", name)
    )
    width = max(map(len, rows))
    terminalreporter.section("reliability")
    terminalreporter.write_line(" " * width + "".join(f"{column:>12}" for column in columns))
    for row, counts in sorted(rows.items()):
        terminalreporter.write_line(f"{row:<{width}}" + "".join(f"{counts.get(column, ''):>12}" for column in columns))


@pytest.fixture
def cpu_mesh() -> Iterator[Any]:
    """One process on the CPU, the variables of whose programs end with the test.

    Paddle gives the variables of every program alike names; accumulated gradients would meet those of an earlier one.
    """
    import paddle

    from vit_static.parallel.mesh import MeshShape, start_mesh

    with paddle.static.scope_guard(paddle.static.Scope()):
        yield start_mesh(MeshShape(1, 1, 1), "cpu")


@pytest.fixture(params=[False, True], ids=["paddle", "onednn"])
def kernels(request: pytest.FixtureRequest) -> Any:
    """A test once with Paddle's own CPU kernels, once with ours of oneDNN."""
    from vit_static.config.schema import KernelsConfig

    return KernelsConfig(onednn=request.param)


@pytest.fixture
def make_program(cpu_mesh: Any) -> Callable[..., Any]:
    """Return make(model, batch_size, optim, **changed), which makes the program of a model on one CPU process.

    `changed`: other fields of its ProgramSpec and TrainingSpec, or `criterion`; `evaluates_only` leaves training out.
    """
    from helpers.small import SMALL

    from vit_static.config.data_schema import LossConfig
    from vit_static.config.schema import OptimConfig
    from vit_static.model.loss import Criterion
    from vit_static.plan.costs import program_costs
    from vit_static.program.precision import Precision
    from vit_static.program.program import Program
    from vit_static.program.spec import ProgramSpec, TrainingSpec

    def make(
        model: Any,
        batch_size: int,
        optim: OptimConfig | None = None,
        *,
        criterion: Any = None,
        evaluates_only: bool = False,
        **changed: Any,
    ) -> Program:
        optim = optim or OptimConfig()
        fields = {"precision": Precision("O0", "float32"), "image_size": SMALL.image_size, **changed}
        rate = fields.pop("learning_rate", lambda step: optim.lr)
        names = ("freeze", "target_classes", "warmup_steps", "train_image_size", "image_size_varies")
        training_fields = {name.removeprefix("train_"): fields.pop(name) for name in names if name in fields}
        training = TrainingSpec(optim, rate, batch_size, count_costs=program_costs, **training_fields)
        spec = ProgramSpec(**fields, eval_batch_size=batch_size, training=None if evaluates_only else training)
        return Program(model, criterion or Criterion(LossConfig()), cpu_mesh, spec)

    return make

"""A GPU that records the calls made to it, and has its work done by the CPU.

Code under `device == "gpu"` runs as on a GPU. Only the calls to the device itself are replaced, at the lowest level:
Paddle's device functions and places, DALI's operators with device="gpu" or "mixed", and the calls that would wait for a
GPU or copy synchronously, which do their work and are recorded. Programs are executed by the CPU's executor, so they
must be in float32.

What a kernel of the compiled program does on a GPU isn't seen here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import paddle
from nvidia.dali import backend as dali_backend
from nvidia.dali.pipeline import Pipeline
from paddle.base import core, executor

TRAIN_STEP = "training step"  # the name of the call that starts one


class Place(core.CPUPlace):
    """The place of the recorded GPU."""

    def __init__(self, device_id: int = 0) -> None:
        assert device_id == 0, f"GPU {device_id}: this machine has one GPU"
        super().__init__()

    def get_device_id(self) -> int:
        return 0


class Stream:
    """A stream of the recorded GPU."""

    place = Place()


@dataclass(frozen=True)
class Call:
    """A call to the device: its name, whether the host waits until all work queued so far is done, and the caller."""

    name: str
    waits: bool
    caller: str


@dataclass(frozen=True)
class Operator:
    """One of DALI's operators: its name and device, and the devices of its positional inputs."""

    name: str
    device: str
    inputs: tuple[str, ...]


@dataclass
class RecordedDevice:
    """The calls to one GPU, in order."""

    name: str = "NVIDIA H100 80GB HBM3"
    calls: list[Call] = field(default_factory=list)
    num_launched: int = 0  # programs started so far
    operators: list[Operator] = field(default_factory=list)  # DALI's, once for each of their outputs
    outputs: list[list[str]] = field(default_factory=list)  # the devices of the outputs of each of DALI's pipelines

    def add(self, name: str, *, waits: bool = False) -> None:
        self.calls.append(Call(name, waits, _caller()))

    def launch(self, name: str) -> None:
        self.num_launched += 1
        self.add(name)

    def names(self) -> list[str]:
        return [call.name for call in self.calls]

    def waits_after_steps(self) -> list[list[Call]]:
        """Return the waiting calls after the start of each training step, up to the next start."""
        intervals: list[list[Call]] = []
        for call in self.calls:
            if call.name == TRAIN_STEP:
                intervals.append([])
            elif intervals and call.waits:
                intervals[-1].append(call)
        return intervals


class Event:
    """core.CUDAEvent: `synchronize` waits only for the work queued before `record`."""

    def __init__(self, device: RecordedDevice) -> None:
        self._device, self._position = device, 0

    def record(self, stream: Stream) -> None:
        self._device.add("Event.record")
        self._position = self._device.num_launched

    def synchronize(self) -> None:
        """Count as waiting for the device if no work would be left in its queue."""
        self._device.add("Event.synchronize", waits=self._position == self._device.num_launched)


@contextmanager
def recorded_gpu() -> Iterator[RecordedDevice]:
    """Run as on one GPU within the context, and record what is asked of it."""
    device = RecordedDevice()
    place = paddle.framework._current_expected_place_()
    with ExitStack() as stack:
        stack.callback(paddle.base.framework._set_expected_place, place)
        for target, name, replacement in (*_compiled_functions(device), *_place(), *_dali(device)):
            stack.enter_context(patch.object(target, name, replacement, create=target is core))
        # What this module imports depends on the wheel. (`paddle.device` is an object that stands for it.)
        names = paddle.device.Event.__init__.__globals__
        stack.enter_context(patch.dict(names, _create_event_base=paddle.device.cuda.create_event))
        for target, name, is_wait in _host_copies():
            stack.enter_context(_recording(device, target, name, is_wait))
        stack.enter_context(_recorded_runs(device))
        yield device


def _compiled_functions(device: RecordedDevice) -> list[tuple[Any, str, Any]]:
    """Return the compiled functions and classes of Paddle's GPU wheel for the device, and what replaces them."""

    def recorded(name: str, result: Any, *, waits: bool = False) -> Callable[[int], Any]:
        def function(device_id: int) -> Any:
            assert device_id == 0, f"GPU {device_id}: this machine has one GPU"
            device.add(name, waits=waits)
            return result

        return function

    def memory(kind: str, device_id: int) -> int:
        return recorded(f"memory {kind}", 10**9)(device_id)

    def cuda(self: paddle.Tensor, device_id: int | None = None, blocking: bool = True) -> paddle.Tensor:
        device.add("Tensor.cuda", waits=blocking)
        return self.clone()

    properties = SimpleNamespace(name=device.name, major=9, minor=0)
    return [
        *((module, name, lambda: True) for module, name in _holders(core.is_compiled_with_cuda)),
        *((module, name, Place) for module, name in _holders(core.CUDAPlace)),
        (core, "CUDAStream", Stream),
        *((module, name, lambda *_, **__: Event(device)) for module, name in _holders(core.CUDAEvent)),
        (core, "get_cuda_device_count", lambda: 1),
        (core, "get_cuda_current_device_id", lambda: 0),
        (core, "_get_current_stream", lambda device_id: Stream()),
        (core, "default_cuda_generator", lambda device_id: core.default_cpu_generator()),
        (core, "get_device_properties", recorded("properties", properties)),
        (core, "device_memory_stat_peak_value", memory),
        (core, "_device_synchronize", recorded("synchronize", None, waits=True)),
        (paddle.version, "cuda", lambda: "12.9"),
        (paddle.Tensor, "cuda", cuda),
    ]


def _place() -> list[tuple[Any, str, Any]]:
    """Return the function for the current device, which the CPU's tracer resets, and what replaces it."""
    place = Place()
    return [(module, name, lambda: place) for module, name in _holders(paddle.base.framework._current_expected_place_)]


def _holders(value: Any) -> list[tuple[Any, str]]:
    """Return the modules of Paddle that have imported a function or class, each with its name there."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "paddle"]
    return [(module, name) for module in modules for name, other in vars(module).copy().items() if other is value]


def _host_copies() -> list[tuple[Any, str, Callable[..., bool]]]:
    """Return Paddle's functions that copy between host and GPU, and when the host waits for the copy."""

    def always(*_: Any, **__: Any) -> bool:
        return True

    def to_gpu(tensor: Any, values: Any, place: Any, *_: Any) -> bool:
        return isinstance(place, Place)

    methods = ("numpy", "item", "tolist", "__array__", "__float__", "__int__", "__bool__", "__index__")
    return [
        *((paddle.Tensor, name, always) for name in methods),
        (paddle, "to_tensor", always),
        (core.DenseTensor, "__array__", always),
        (core.DenseTensor, "set", to_gpu),
        (core.DenseTensor, "_copy_from", lambda *_: False),
    ]


@contextmanager
def _recording(device: RecordedDevice, target: Any, name: str, is_wait: Callable[..., bool]) -> Iterator[None]:
    original = getattr(target, name)
    owner = getattr(target, "__name__", str(target)).rpartition(".")[2]

    def function(*arguments: Any, **named: Any) -> Any:
        device.add(f"{owner}.{name}", waits=is_wait(*arguments, **named))
        return original(*arguments, **named)

    with patch.object(target, name, function):
        yield


@contextmanager
def _recorded_runs(device: RecordedDevice) -> Iterator[None]:
    """Record each start of a program, and the copies of its results to the host."""
    run = executor.Executor.run

    def recorded_run(self: Any, program: Any = None, *arguments: Any, **named: Any) -> Any:
        assert isinstance(self.place, Place), f"a program runs on {self.place}"
        is_training = any("_grad" in op.name() for op in program.global_block().ops)
        device.launch(TRAIN_STEP if is_training else "another program")
        results = run(self, program, *arguments, **named)
        if named.get("fetch_list"):
            device.add("Executor.run with results", waits=True)
        return results

    with patch.object(executor.Executor, "run", recorded_run):
        yield


def _dali(device: RecordedDevice) -> list[tuple[Any, str, Any]]:
    """Return DALI's classes that put operators on a device, and what replaces them.

    The graph is that of a GPU, with DALI's own checks of it. Its operators are given to the backend as the CPU's.
    """
    get_params = Pipeline._get_params
    init_backend = Pipeline._init_pipeline_backend

    def cpu_params(self: Pipeline) -> Any:
        assert self._device_id in (None, 0), f"{self._device_id} is not a device of this machine"
        with patch.object(self, "_device_id", None):
            return get_params(self)

    def init_cpu_backend(self: Pipeline) -> None:
        init_backend(self)
        if self._device_id is not None:
            device.outputs.append([output_device for _, output_device in self._names_and_devices])
        self._names_and_devices = [(name, "cpu") for name, _ in self._names_and_devices]

    return [
        (dali_backend, "OpSpec", lambda name: _OpSpec(name, device)),
        (Pipeline, "_get_params", cpu_params),
        (Pipeline, "_init_pipeline_backend", init_cpu_backend),
    ]


class _OpSpec(dali_backend.OpSpec):
    """The description of one of DALI's operators, with the CPU as the device of everything.

    Checks before that each input lies where the operator on its own device wants it.
    """

    def __init__(self, schema: str, recorder: RecordedDevice) -> None:
        super().__init__(schema)
        self._schema_name, self._recorder = schema, recorder
        self._calls: list[tuple[str, tuple[Any, ...]]] = []
        self._device = "cpu"
        self._inputs: list[str] = []

    def copy(self) -> _OpSpec:
        spec = _OpSpec(self._schema_name, self._recorder)
        for method, arguments in self._calls:
            getattr(spec, method)(*arguments)
        return spec

    def AddArg(self, key: str, value: Any) -> Any:
        self._calls.append(("AddArg", (key, value)))
        if key == "device":
            self._device, value = value, "cpu"
        return super().AddArg(key, value)

    def AddArgEmptyList(self, *arguments: Any) -> Any:
        self._calls.append(("AddArgEmptyList", arguments))
        return super().AddArgEmptyList(*arguments)

    def AddInput(self, name: str, device: str, *description: Any) -> Any:
        schema = dali_backend.GetSchema(self._schema_name, follow_aliases=True)
        needed = schema.GetInputDevice(len(self._inputs), device, self._device)
        assert needed in (None, device) or (needed == "mixed" and device == "cpu"), (
            f"{self._schema_name} on {self._device}: its input {len(self._inputs)} is on {device}, not on {needed}"
        )
        self._inputs.append(device)
        return super().AddInput(name, "cpu", *description)

    def AddOutput(self, name: str, device: str) -> Any:
        self._recorder.operators.append(Operator(self._schema_name, self._device, tuple(self._inputs)))
        return super().AddOutput(name, "cpu")


def _caller() -> str:
    """Return the file and line in the package from which a call came."""
    frame: Any = sys._getframe(1)
    while frame is not None and "vit_static" not in (path := frame.f_code.co_filename).split("/")[-3:-1]:
        frame = frame.f_back
    return "outside of the package" if frame is None else f"{path.rpartition('vit_static/')[2]}:{frame.f_lineno}"

"""Every name of Paddle and DALI that the code mentions exists in the installed wheels, with the arguments it gets.

A run on a CPU doesn't reach what only GPUs execute, so a wrong name there would surface on a user's GPU. The Python
code of Paddle's CPU and GPU wheels is the same, so a syntax tree can be checked here instead. What only the GPU wheel
has is listed in ONLY_IN_GPU_WHEEL.

A chain of attributes is followed from a name that is imported (`paddle.device.cuda.device_count`, `fn.decoders.image`,
`from paddle.utils.dlpack import from_dlpack`), or that is assigned such a chain (`libpir = paddle.base.libpaddle.pir`),
to its end or to the first call.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.small import ROOT
from helpers.syntax import dotted_path

LIBRARIES = ("paddle", "nvidia.dali")
FOLDERS = ("vit_static", "data_tools", "tests")
# Compiled functions of the GPU wheel: name -> why the CPU wheel lacks it.
ONLY_IN_GPU_WHEEL: dict[str, str] = {}


class Use(NamedTuple):
    """A chain of attributes in the code, resolved from the module that starts it."""

    path: str  # such as paddle.device.cuda.device_count
    line: int
    call: ast.Call | None  # the call of the chain, if it is one


def python_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """Yield a local name, the dotted path that it stands for, and the line, of each import from the libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_of_library(alias.name):
                    top = alias.name.split(".")[0]
                    yield (alias.asname, alias.name, node.lineno) if alias.asname else (top, top, node.lineno)
                    yield "", alias.name, node.lineno  # `import a.b.c` also says that a.b.c exists
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                if is_of_library(path):
                    yield alias.asname or alias.name, path, node.lineno


def is_of_library(path: str) -> bool:
    return any(f"{path}.".startswith(f"{library}.") for library in LIBRARIES)


def uses(tree: ast.AST) -> Iterator[Use]:
    """Yield every chain of attributes that starts with an imported name or with an alias of one."""
    names: dict[str, str] = {}
    for name, path, line in imported_names(tree):
        names[name] = path
        yield Use(path, line, None)
    names.update(aliases(tree, names))
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.Name):
            continue
        is_whole = isinstance(node, ast.Attribute) and id(node) not in inner
        is_called_name = isinstance(node, ast.Name) and id(node) in calls
        chain = dotted_path(node, names) if is_whole or is_called_name else None
        if chain is not None and is_of_library(chain):
            yield Use(chain, node.lineno, calls.get(id(node)))


def aliases(tree: ast.AST, names: dict[str, str]) -> dict[str, str]:
    """Return the names that only ever stand for one chain: `name = paddle.base.core`."""
    stored = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    stored += [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    result = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name, path = node.targets[0].id, dotted_path(node.value, names)
            if path is not None and stored.count(name) == 1:
                result[name] = path
    return result


def resolve(path: str) -> Any:
    """Return the object that a dotted path names. Raises AttributeError with the first part that doesn't exist."""
    parts = path.split(".")
    value: Any = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(parts[:index]))
            except ModuleNotFoundError:
                raise AttributeError(".".join(parts[:index])) from None
        value = getattr(value, part)
    return value


def why_wrong(use: Use) -> str | None:
    """Return what doesn't exist, or which argument isn't accepted, or None."""
    try:
        value = resolve(use.path)
    except AttributeError as error:
        return None if use.path in ONLY_IN_GPU_WHEEL else f"{error} does not exist"
    return None if use.call is None else wrong_arguments(value, use)


def wrong_arguments(function: Any, use: Use) -> str | None:
    call = use.call
    assert call is not None
    is_starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled functions have none
        return None
    try:
        signature.bind_partial(*([] if is_starred else call.args), **keywords)
    except TypeError as error:
        return f"{use.path}: {error}"
    return None


def problems(source: str, name: str) -> list[str]:
    return [f"{name}:{use.line}: {why}" for use in uses(ast.parse(source)) if (why := why_wrong(use)) is not None]


def test_every_name_of_paddle_and_dali_exists() -> None:
    wrong = [
        problem
        for path in python_files()
        for problem in problems(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert wrong == []


def test_the_list_of_the_gpu_wheel_has_nothing_that_the_cpu_wheel_has() -> None:
    for path, reason in ONLY_IN_GPU_WHEEL.items():
        assert reason
        with pytest.raises(AttributeError):
            resolve(path)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import paddle\npaddle.device.cuda.current_device()", "paddle.device.cuda.current_device does not exist"),
        ("import paddle.device.cuda as c\nc.current_device()", "paddle.device.cuda.current_device does not exist"),
        ("from paddle.device import cuda\nx = cuda.missing", "paddle.device.cuda.missing does not exist"),
        ("import paddle\nops = paddle._C_ops\nops.missing(1)", "paddle._C_ops.missing does not exist"),
        ("from nvidia.dali import fn\nfn.decoders.picture(1)", "nvidia.dali.fn.decoders.picture does not exist"),
        ("from paddle.utils.dlpack import to_tensor", "paddle.utils.dlpack.to_tensor does not exist"),
        ("import paddle.devices", "paddle.devices does not exist"),
        ("def f():\n    import paddle\n    return paddle.float13", "paddle.float13 does not exist"),
        (
            "import paddle\npaddle.set_device('gpu', index=0)",
            "paddle.set_device: got an unexpected keyword argument 'index'",
        ),
        (
            "import paddle\npaddle.device.cuda.device_count(0)",
            "paddle.device.cuda.device_count: too many positional arguments",
        ),
    ],
)
def test_a_wrong_name_or_argument_is_found(source: str, problem: str) -> None:
    assert problems(source, "file")[-1].split(": ", 1)[1] == problem


def test_names_of_other_origin_are_left_alone() -> None:
    source = "import paddle, numpy as np\nx = paddle.to_tensor(1).whatever\nnp.nothing\npaddle.static.Program().any"
    assert problems(source, "file") == []

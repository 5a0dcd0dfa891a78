"""CONTRIBUTING's table of Paddle internals lists exactly what the package uses of them.

The rule is mechanical. A module uses Paddle's internals where it

- imports or names something below one of PRIVATE_MODULES, or a name with a leading underscore below `paddle`;
- imports from Paddle, and accesses an attribute with a leading underscore that the module (for `self`: the package)
  doesn't define;
- overrides a private method of one of PADDLE_CLASSES;
- assigns to an attribute of a Paddle module or class;
- contains the name of a Paddle flag, the prefix of Paddle's operator names, or the name of a library in its wheel;
- reads or sets `op_role`, an operator's role.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

from helpers.small import ROOT
from helpers.syntax import dotted_path

PACKAGE = ROOT / "vit_static"
PEERS = PACKAGE / "bench" / "peers"  # scripts for other environments
PRIVATE_MODULES = (
    "paddle.amp.amp_lists",
    "paddle.base",
    "paddle.distributed.auto_parallel.placement_type",
    "paddle.distributed.auto_parallel.static",
    "paddle.distributed.collective",
    "paddle.distributed.communication.group",
    "paddle.distributed.parallel",
    "paddle.distributed.passes",
    "paddle.framework",
    "paddle.pir",
    "paddle.static.MetaTensor",
    "paddle.static.amp",
    "paddle.static.python_op",
)
OPERATOR_PREFIXES = ("pd_op.", "builtin.", "py_op.")
LIBRARIES = ("libdnnl.so.3", "libmklml_intel.so")
ROW = re.compile(r"\| `([^`]+)` \| (.+?) \| ([\d.]+) \| (.+) \|")


@cache
def paddle_methods() -> set[str]:
    """The private methods of the Paddle classes that the package inherits from."""
    import paddle

    classes = (paddle.optimizer.Optimizer, paddle.optimizer.AdamW, paddle.nn.ClipGradByGlobalNorm, paddle.nn.Layer)
    return {name for base in classes for name in dir(base) if is_private(name)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def package_modules() -> dict[Path, ast.Module]:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PEERS]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def defined_names(tree: ast.AST) -> set[str]:
    """The names of a module's functions, classes, variables and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def paddle_names(tree: ast.AST) -> dict[str, str]:
    """What a module's names that are imported from Paddle stand for: `pir` for `paddle.pir`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "paddle":
                    names[alias.asname or "paddle"] = alias.name if alias.asname else "paddle"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "paddle":
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def internals_in(tree: ast.AST, defined_in_package: set[str]) -> Iterator[str]:
    """What a module uses of Paddle's internals: names of modules, attributes, methods, flags."""
    names = paddle_names(tree)
    own_names = {False: defined_names(tree), True: defined_in_package}  # by whether the object is `self`

    for name in names.values():
        yield from private_parts(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = dotted_path(node, names)
            if path is not None:
                yield from private_parts(path)
                if isinstance(node.ctx, ast.Store):
                    yield node.attr
            elif node.attr == "op_role":
                yield "op_role"
            elif names and is_private(node.attr) and node.attr not in own_names[is_self(node.value)]:
                yield node.attr
        elif isinstance(node, ast.ClassDef):
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            yield from methods & paddle_methods()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"FLAGS_\w+", node.value) or node.value in LIBRARIES:
                yield node.value
            yield from (prefix for prefix in OPERATOR_PREFIXES if node.value.startswith(prefix))


def private_parts(path: str) -> Iterator[str]:
    """The private module that a dotted name lies in, and those of its parts that have a leading underscore."""
    yield from (module for module in PRIVATE_MODULES if f"{path}.".startswith(f"{module}."))
    yield from (part for part in path.split(".") if is_private(part))


def internals_by_file() -> dict[str, set[str]]:
    modules = package_modules()
    defined_in_package = set().union(*map(defined_names, modules.values()))
    used = {
        path.relative_to(PACKAGE).as_posix(): set(internals_in(tree, defined_in_package))
        for path, tree in modules.items()
    }
    return {file: internals for file, internals in used.items() if internals}


def table() -> list[tuple[str, set[str], str, str]]:
    """The rows of CONTRIBUTING's table: file, internals, Paddle's version, reason."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("\n## Paddle internals\n")[2].partition("\n## ")[0]
    rows = [ROW.fullmatch(line) for line in section.splitlines() if line.startswith("| `")]
    assert all(rows), "a row isn't: | `file` | `name`, ... | version | reason |"
    return [(row[1], set(re.findall(r"`([^`]+)`", row[2])), row[3], row[4]) for row in rows if row]


def test_the_table_lists_what_the_package_uses() -> None:
    listed: dict[str, set[str]] = defaultdict(set)
    for file, internals, _, _ in table():
        assert not listed[file] & internals, f"{file}: listed twice"
        listed[file] |= internals
    used = internals_by_file()
    assert set(listed) == set(used)
    for file, internals in used.items():
        assert listed[file] == internals, file


def test_every_row_has_the_pinned_version_and_a_reason() -> None:
    for file, internals, paddle_version, reason in table():
        assert internals, file
        assert paddle_version == version("paddlepaddle").split("+")[0], file
        assert len(reason.split()) > 3, file


def test_the_rule_finds_each_kind_of_use() -> None:
    source = """
import paddle
from paddle import nn, pir
from paddle.base import core
import os

class Clip(nn.ClipGradByGlobalNorm):
    def _pir_clip(self, gradients):
        self._mine = self._theirs
        return super()._pir_clip(gradients)

def use(tensor, operation):
    os.environ["FLAGS_use_x"] = "1"
    paddle.Tensor.cuda = None
    pir.set_op_role(operation.op_role)
    paddle.nn.Linear(2, 3)._sub_layers
    return paddle._C_ops.relu(tensor._local_value()), operation.name() == "pd_op.relu", core.VarDesc, Clip()._mine
"""
    tree = ast.parse(source)
    assert set(internals_in(tree, defined_names(tree))) == {
        *("FLAGS_use_x", "_C_ops", "_local_value", "_pir_clip", "_sub_layers", "_theirs", "cuda", "op_role"),
        *("paddle.base", "paddle.pir", "pd_op."),
    }

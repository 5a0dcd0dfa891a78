"""Imports go down only: from a layer to those below it, or within it without a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

from small import ROOT

PEERS = ROOT / "vit_static" / "bench" / "peers"  # scripts, which import nothing of the package
# As the architecture has it; a new module must be given its place.
LAYERS = [
    {
        "__init__",
        "config",
        "schedule",
        "log",
        "flops",
        "devices",
        "files",
        "pictures",
        "mistakes",
        "history",
        "charts",
        "html_pieces",
        "mistakes_section",
        "report",
        "page",
        "runtime",
        "resampling",
        "formats",
        "weight_files",
        "weight_names",
        "yaml_text",
    },
    {"model", "loss", "data", "mesh", "agreement", "mixing", "environment"}
    | {f"data.{name}" for name in ("lists", "images", "shards", "sets", "order", "augment", "operations", "pipeline")}
    | {"data.reader", "data.feed", "data.relabelled"}
    | {"costs", "placement", "cpu_collectives", "cpu_kernels", "cpu_patterns", "onednn"}
    | {"buckets", "dropout", "paddle_internals", "passes", "state_parts"},
    {"optim", "weights", "checkpoint", "saving", "inference_model", "model_folder", "model_card"},
    {"step"},
    {"train", "evaluate", "export", "predict", "plan", "convert", "attend"}
    | {"sessions", "onnx_files", "screen", "tracing", "pixels"},
    {
        "bench",
        *(f"bench.{name}" for name in ("contenders", "step", "train", "scaling", "profile", "infer", "cards")),
        *(f"bench.{name}" for name in ("data", "data_scale", "data_cards", "photographs")),
    }
    | {"bench.peers", *(f"bench.peers.{path.stem}" for path in PEERS.glob("[a-z]*.py"))},
    {"serve"},
    {"__main__", "launch", "launch_layout", "launch_peers"},
]
WITHOUT_PADDLE = LAYERS[0] - {"runtime"} | {"data", "launch", "launch_layout", "launch_peers"}
WITHOUT_PADDLE |= {f"data.{name}" for name in ("lists", "images", "shards", "sets", "order", "augment", "reader")}


def modules() -> dict[str, set[str]]:
    """Every module of the package, and what of the package it imports, at its top or inside a function."""
    package = ROOT / "vit_static"
    found = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        imports = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "vit_static":
                imports |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vit_static."):
                imports.add((node.module or "").removeprefix("vit_static."))
            elif isinstance(node, ast.Import):
                imports |= {a.name.removeprefix("vit_static.") for a in node.names if a.name.startswith("vit_static.")}
        found[name] = imports
    return found


def test_every_module_has_a_layer() -> None:
    assert set(modules()) == set().union(*LAYERS)


def test_no_import_goes_up() -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    upward = [(name, other) for name, imports in modules().items() for other in imports if layer[other] > layer[name]]
    assert not upward


def test_no_circle() -> None:
    list(TopologicalSorter(modules()).static_order())  # raises CycleError


def test_the_lowest_layer_does_without_paddle() -> None:
    for name in WITHOUT_PADDLE:
        path = ROOT / "vit_static" / (name.replace(".", "/") + ".py")
        if not path.exists():
            path = ROOT / "vit_static" / name / "__init__.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert not [module for module in imported if module.split(".")[0] in ("paddle", "nvidia")], name


def test_the_package_imports_no_data_tool() -> None:
    for path in (ROOT / "vit_static").rglob("*.py"):
        assert "import data_tools" not in path.read_text() and "from data_tools" not in path.read_text(), path

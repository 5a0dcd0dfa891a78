"""Vision Transformers on PaddlePaddle: static, auto-parallel programs, fed by NVIDIA DALI.

    import vit_static

    config = vit_static.load_config("quickstart", ["train.epochs=5"])  # a YAML file, or a recipe's name
    run = vit_static.train(config)  # in processes of its own; run.folder, run.metrics
    vit_static.evaluate(run.folder)  # {'top1': ..., 'loss': ..., ...}

    model = vit_static.load_weights(run.folder)  # a run, a checkpoint, or a file: .npz, .safetensors, ...
    model(["3.jpeg"])[0].names  # the most likely classes of an image
    model.attention(["3.jpeg"])  # where the model looked, [1, rows, columns]
    model.layer  # a paddle.nn.Layer

    vit_static.export(run.folder, "exported")  # files for inference, checked against the trained model
    vit_static.load("exported")(["3.jpeg"])  # the same with Paddle Inference

    vit_static.build("S/16", num_classes=10)  # an untrained paddle.nn.Layer
    vit_static.VARIANTS  # the named sizes

Importing this package is fast: Paddle and DALI are imported by what needs them, without their messages. A mistake in an
argument raises ValueError with one line. configs/PYTHON.md explains everything; `help(vit_static.build)` a function.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_static.api import TrainResult, build, evaluate, export, load, load_weights, train
    from vit_static.config.loader import load_config
    from vit_static.config.schema import Config
    from vit_static.model.variants import VARIANTS

__version__ = "0.1.0"
__all__ = [
    "VARIANTS",
    "Config",
    "TrainResult",
    "__version__",
    "build",
    "evaluate",
    "export",
    "load",
    "load_config",
    "load_weights",
    "train",
]

_API = "vit_static.api"
# `train` and `export` are packages, too: see CallablePackage.
_MODULES = {
    "Config": "vit_static.config.schema",
    "VARIANTS": "vit_static.model.variants",
    "load_config": "vit_static.config.loader",
    **dict.fromkeys(("TrainResult", "build", "evaluate", "load", "load_weights"), _API),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in ("train", "export"):
        return import_module(f"vit_static.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'vit_static' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class CallablePackage(ModuleType):
    """A package that can be called as the function of the same name in `vit_static.api`.

    `vit_static.train` is the package of the training loop, as soon as anything of it is imported, and the public
    function `train`; likewise `export`.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(import_module(_API), self.__name__.rpartition(".")[2])(*arguments, **options)

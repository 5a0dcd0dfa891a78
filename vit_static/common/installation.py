"""Where this program's files are, and what it is called: a source tree has run.sh, an installed wheel a command."""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel has these folders of the source tree inside the package (see setup.cfg).
IS_WHEEL = (_PACKAGE / "configs").is_dir()
SOURCE_TREE = None if IS_WHEEL else _PACKAGE.parent
CONFIGS = (_PACKAGE if IS_WHEEL else _PACKAGE.parent) / "configs"
COMMAND = "vit_static" if IS_WHEEL else "./run.sh"

# The extra of setup.cfg that installs a package which only some verbs import, by its name in Python.
EXTRAS = {
    **dict.fromkeys(("multipart", "prometheus_client", "starlette", "uvicorn"), "serve"),
    **dict.fromkeys(("ml_dtypes", "onnx", "onnxruntime", "paddle2onnx"), "onnx"),
    "paddle": "cpu",
    "pyarrow": "parquet",
}

# The programs of data_tools/, with what each does. A tool's module has its name, and main(argv) -> exit code.
DATA_TOOLS = {
    "digits": "write scikit-learn's 1,797 handwritten digits as JPEG files in class folders",
    "imagenet": "unpack ImageNet-1k's archives into class folders and list files",
    "imagenet21k": "list ImageNet-21k's images, each with all of its labels",
    "folder": "split your own images, one folder per class, into training and validation",
    "cifar10": "unpack CIFAR-10's archive into class folders",
    "check": "read every image of a dataset and find those that would stop training",
    "shards": "pack a dataset into WebDataset shards, for network disks",
}

_PAGE = re.compile(r"(?<![\w/])configs/(?=[A-Z]+\.md)")


def describe_missing(error: ModuleNotFoundError) -> str | None:
    """Return a line for users about a missing package of an extra, with the remedy; None for any other module."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    remedy = f"pip install 'vit_static[{EXTRAS[package]}]'" if IS_WHEEL else "./run.sh setup"
    return f"{package} is not installed; run {remedy}"


def localize(message: str) -> str:
    """Return a message that names ./run.sh or a page of configs/ with the names that these have in an installed wheel.

    In a source tree, nothing changes.
    """
    return _PAGE.sub(f"{CONFIGS}/", message.replace("./run.sh", COMMAND)) if IS_WHEEL else message

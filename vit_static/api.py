"""Public functions of the package, which `vit_static` offers under their own names; see configs/PYTHON.md.

What trains or writes runs as its verb on the command line, in processes of its own: on all visible GPUs, with its own
signal handlers, and without consequences for this process, which Paddle's static mode would have.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vit_static.common.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_USER_MISTAKE,
    RunFailed,
    UserError,
    require_argument,
    require_overrides,
    require_path,
)
from vit_static.common.installation import SOURCE_TREE
from vit_static.common.startup import import_paddle_quietly, user_environ
from vit_static.config.loader import dump_config, make_config
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import BackendChoice, Config, InferencePrecision
from vit_static.launch.launcher import stop_with_parent

if TYPE_CHECKING:
    from vit_static.inference.predictor import Predictor
    from vit_static.inference.trained_model import TrainedModel
    from vit_static.model.vit import VisionTransformer
    from vit_static.weights.source import WhichWeights

PathLike = str | os.PathLike[str]

_MAX_SHOWN_LINES = 20  # of a failed verb's output


@dataclass(frozen=True)
class TrainResult:
    """The end of a training run."""

    folder: Path  # config.run_dir: checkpoints, weights, metrics.jsonl, report.html
    is_finished: bool  # False: stopped on request; the same call resumes
    metrics: dict[str, float]  # of the last evaluation, as in metrics.jsonl; empty without one


def load(
    folder: PathLike,
    *,
    precision: InferencePrecision | None = None,
    num_threads: int | None = None,
    backend: BackendChoice = "auto",
) -> Predictor:
    """Open an exported model for prediction, on a GPU if there is one.

    By default it runs in the precision of the export, on all cores that this process may use, and in the backend that
    is fastest on this machine: paddle, or for an export with an ONNX file onnxruntime or openvino, where installed.
    Raise PredictError, a ValueError, if `export` didn't write the folder, or if this machine can't run the precision or
    the backend.
    """
    require_path("folder", folder)
    is_count = num_threads is None or (type(num_threads) is int and num_threads > 0)
    require_argument(is_count, "num_threads", num_threads, "None or a number above 0")
    precisions = get_args(InferencePrecision)
    require_argument(precision in (None, *precisions), "precision", precision, f"one of {', '.join(precisions)}")
    backends = get_args(BackendChoice)
    require_argument(backend in backends, "backend", backend, f"one of {', '.join(backends)}")
    import_paddle_quietly()
    from vit_static.inference.predictor import load_predictor

    with _messages_for_python():
        return load_predictor(folder, precision=precision, num_threads=num_threads, backend=backend)


def build(model: str | ModelConfig | Config = "B/16", **keys: Any) -> VisionTransformer:
    """Return an untrained Vision Transformer, a `paddle.nn.Layer`.

    `model` is a name in VARIANTS or a config; `keys` are those of the config's section model, such as `num_classes=10`,
    `image_size=(32, 32)`, `depth=4`. The layer takes images [B, 3, height, width] float32 and returns logits
    [B, num_classes]; its `features` returns [B, width]. Raise ConfigError, a ValueError, for keys that don't exist or
    don't fit each other.
    """
    is_model = isinstance(model, str | ModelConfig | Config)
    require_argument(is_model, "model", model, "a name in vit_static.VARIANTS or a config")
    config = model.model if isinstance(model, Config) else model
    given = {"variant": config} if isinstance(config, str) else config.model_dump(by_alias=True)
    config = make_config({"model": {**given, **keys}}).model
    import_paddle_quietly()
    from vit_static.model.vit import VisionTransformer

    return VisionTransformer(config)


def load_weights(
    source: PathLike,
    *,
    config: Config | None = None,
    overrides: Sequence[str] = (),
    ema: bool = False,
    which: WhichWeights = "last",
) -> TrainedModel:
    """Load a trained model from a run's folder, a checkpoint, or a file (.pdparams, .npz, .safetensors, ...).

    Without `config`, its config is the one next to the weights or, for other programs' files, inferred from them.
    `overrides` are as on the command line: `["eval.crop_pct=1.0"]`. `ema` selects the moving average, `which` a run's
    best or last weights. The model runs on the CPU, and sets Paddle's device to it. Raise WeightsError or ConfigError,
    ValueErrors, for weights that can't be read or don't fit.
    """
    _require_source("source", source, overrides, which)
    if config is not None:
        _require_config(config)
    import_paddle_quietly()
    from vit_static.inference.trained_model import load_trained

    with _messages_for_python():
        return load_trained(Path(source), config, list(overrides), ema=ema, which=which)


def train(config: Config, *, resume: PathLike = "auto", verbose: bool = True) -> TrainResult:
    """Train as the verb `pretrain` does, on all visible GPUs or on the CPU, and return when the run ends.

    A run whose folder has a checkpoint is resumed; `resume` is "auto", "never", or the path of a checkpoint. `verbose`
    prints the run's lines as they come. On KeyboardInterrupt the run saves its state before it is raised again.

    Raise UserError, a ValueError, for the user's mistakes, and RunFailed, a RuntimeError, for any other failure.
    """
    _require_config(config)
    require_path("resume", resume)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        dump_config(config, path)
        code, _ = _run_verb(["pretrain", "-c", str(path), "--resume", os.fspath(resume)], verbose)
    return TrainResult(config.run_dir, code == EXIT_DONE, _last_metrics(config.run_dir / "metrics.jsonl"))


def evaluate(
    checkpoint: PathLike,
    *,
    overrides: Sequence[str] = (),
    ema: bool = False,
    which: WhichWeights = "last",
    verbose: bool = False,
) -> dict[str, Any]:
    """Evaluate a run, a checkpoint or a file of weights on the validation images, as the verb `eval` does.

    Return the metrics: top-1, top-5, macro F1 and others in percent, the loss, and in `also` those of eval.also's sets.
    The arguments are those of `load_weights`. Raise as `train` does.
    """
    _require_source("checkpoint", checkpoint, overrides, which)
    arguments = ["eval", "--checkpoint", os.fspath(checkpoint), "--weights", which, *_options(overrides, ema)]
    code, lines = _run_verb(arguments, verbose)
    if code == EXIT_STOPPED:
        raise KeyboardInterrupt
    values: dict[str, Any] = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    return values


def export(
    checkpoint: PathLike,
    folder: PathLike,
    *,
    overrides: Sequence[str] = (),
    ema: bool = False,
    which: WhichWeights = "best",
    onnx: bool = False,
    verbose: bool = False,
) -> Path:
    """Export a trained model to a folder for `load`, as the verb `export` does, and return the folder.

    `onnx` also writes model.onnx; the other arguments are those of `load_weights`. Raise as `train` does, and RunFailed
    if the exported model's outputs differ from the trained model's.
    """
    _require_source("checkpoint", checkpoint, overrides, which)
    require_path("folder", folder)
    arguments = ["export", "--checkpoint", os.fspath(checkpoint), "--out", os.fspath(folder), "--weights", which]
    code, _ = _run_verb([*arguments, *_options(overrides, ema), *(["--onnx"] if onnx else [])], verbose)
    if code == EXIT_STOPPED:
        raise KeyboardInterrupt
    return Path(folder)


def _require_config(config: Any) -> None:
    expected = "a config, as vit_static.load_config(NAME_OR_PATH, OVERRIDES) returns it"
    require_argument(isinstance(config, Config), "config", config, expected)


def _require_source(name: str, source: Any, overrides: Any, which: Any) -> None:
    require_path(name, source)
    require_overrides(overrides)
    require_argument(which in ("best", "last"), "which", which, '"best" or "last"')


# What messages of the command line say, and what it is called in Python
_PYTHON_NAMES = [
    (r"'(?:\./run\.sh|vit_static) export --checkpoint (\S+) --out (\S+)'", r"vit_static.export(\1, \2)"),
    (r"'(?:\./run\.sh|vit_static) pretrain'", "vit_static.train"),
    (r"'(?:\./run\.sh|vit_static) export'", "vit_static.export"),
    (r"'(?:\./run\.sh|vit_static) eval'", "vit_static.evaluate"),
    (r"--model takes", "vit_static.load takes"),
    (r"leave --ema out", "leave ema out"),
    (r"--ema\b", "ema=True"),
    (r"--weights (best|last)", r'which="\1"'),
    (r"--resume (\S+?)(?=[;:,]|$|\s)", r'resume="\1"'),
    (r"--precision (\w+)", r'precision="\1"'),
    (r"with -c\b", "as config"),
    (r"-o ([\w.]+=[^\s;,]+)", r'overrides=["\1"]'),
]


def for_python(message: str) -> str:
    """Return a message of the command line with the names that functions and arguments have in Python."""
    for pattern, replacement in _PYTHON_NAMES:
        message = re.sub(pattern, replacement, message)
    return message


@contextmanager
def _messages_for_python() -> Iterator[None]:
    """Raise the UserError that is raised inside with its message for Python."""
    try:
        yield
    except UserError as error:
        raise type(error)(for_python(str(error))) from None


def _options(overrides: Sequence[str], ema: bool) -> list[str]:
    return [word for override in overrides for word in ("-o", override)] + (["--ema"] if ema else [])


def _run_verb(arguments: Sequence[str], verbose: bool) -> tuple[int, list[str]]:
    """Run a verb in a process of its own; return its exit code, EXIT_DONE or EXIT_STOPPED, and what it printed.

    Raise UserError or RunFailed for any other code, and KeyboardInterrupt after one here, when the process has ended.
    """
    environ = {**user_environ(), "PYTHONUNBUFFERED": "1"}
    if SOURCE_TREE is not None:
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE_TREE), environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "vit_static", *arguments],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches it once, through this process
        preexec_fn=stop_with_parent,
    )
    lines: list[str] = []
    show = print if verbose else _ignore
    try:
        was_interrupted = _follow(process, lines, show)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    if was_interrupted:
        raise KeyboardInterrupt
    if process.returncode in (EXIT_DONE, EXIT_STOPPED):
        return process.returncode, lines
    messages = [line.removeprefix("vit_static: ") for line in lines if line.startswith("vit_static: ")]
    if process.returncode == EXIT_USER_MISTAKE and messages:
        raise UserError(for_python(messages[-1]))
    shown = "\n".join(lines[-_MAX_SHOWN_LINES:])
    raise RunFailed(f"{arguments[0]} ended with exit code {process.returncode}:\n{shown}")


def _follow(process: subprocess.Popen[str], lines: list[str], show: Callable[[str], object]) -> bool:
    """Collect and show the process's output until it ends; return whether a KeyboardInterrupt was passed on to it."""
    assert process.stdout is not None
    was_interrupted = False
    while True:
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                show(lines[-1])
            process.wait()
            return was_interrupted
        except KeyboardInterrupt:  # the first makes the process save and end, a second one end at once
            was_interrupted = True
            process.send_signal(signal.SIGINT)


def _ignore(line: str) -> None:
    pass


def _last_metrics(path: Path) -> dict[str, float]:
    """Return the numbers of the last evaluation in a run's metrics.jsonl."""
    last: dict[str, Any] = {}
    with suppress(OSError), path.open(encoding="utf-8") as lines:
        for line in lines:
            with suppress(json.JSONDecodeError):  # a line cut short by a full disk
                record = json.loads(line)
                last = record if record.get("kind") == "eval" else last
    return {name: value for name, value in last.items() if isinstance(value, int | float)}

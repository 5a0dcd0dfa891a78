"""The package's public functions, the examples of configs/PYTHON.md, and the notebook."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from helpers.exported import Exported, in_inference_process
from helpers.forked_launch import start_module
from helpers.forked_verbs import redirect_output, start_forked
from helpers.small import ROOT
from nbclient import NotebookClient
from traitlets.config import Config as TraitletsConfig

import vit_static
from vit_static.api import for_python
from vit_static.common.errors import ConfigError, PredictError, WeightsError
from vit_static.inference.attention_maps import attention_map, load_checkpoint
from vit_static.inference.predictor import Predictor

PAGE = ROOT / "configs" / "PYTHON.md"
NOTEBOOK = ROOT / "configs" / "weights_to_attention.ipynb"
# A model of two blocks, instead of the quickstart's of four.
SMALL = "['train.max_steps=3', 'log.every_steps=1', 'model.depth=2', 'eval.every_epochs=1', 'data.num_threads=1']"

# The first line about a step raises KeyboardInterrupt here, as Ctrl-C would; the same call resumes the run.
INTERRUPTED = f"""
import io, sys, vit_static

class Interrupting(io.StringIO):
    interrupts = True

    def write(self, text):
        if text.startswith("step ") and self.interrupts:
            self.interrupts = False
            raise KeyboardInterrupt
        return super().write(text)

overrides = {SMALL} + ["train.max_steps=400"]
config = vit_static.load_config("quickstart", overrides)
printed, sys.stdout = sys.stdout, Interrupting()
try:
    vit_static.train(config)
    print("not interrupted", file=printed)
except KeyboardInterrupt:
    shown, sys.stdout = sys.stdout.getvalue(), printed
    print([line for line in shown.splitlines() if "stopped" in line][-1])
print(len(list((config.run_dir / "checkpoints").glob("step_*"))), "checkpoint")
"""


def examples() -> str:
    """Return the page's examples as one program, with a shorter run."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    overrides = '["train.epochs=5", "optim.lr=2e-3"]'
    assert code.count(overrides) == 1
    return code.replace(overrides, SMALL)


def run_program(code: str, folder: Path, output: Path) -> None:
    """Run a program in this forked process; the verbs that it starts are forked, too."""
    os.chdir(folder)
    redirect_output(output, output)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    subprocess.Popen = start_module
    exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})
    sys.stdout.flush()


def run_forked(code: str, folder: Path) -> list[str]:
    """Run a program to its end, and return the lines that it printed."""
    output = folder / "output.txt"
    process = start_forked(run_program, code, folder, output)
    process.join(240)
    text = output.read_text()
    assert process.exitcode == 0, text
    return text.splitlines()


def test_importing_the_package_imports_only_the_standard_library() -> None:
    """So it is fast; the public names are there nevertheless, for `dir` and help."""
    code = (
        "import sys; before = set(sys.modules); import vit_static; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names; "
        "assert new == {'vit_static'}, new; assert set(dir(vit_static)) == set(vit_static.__all__)"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_exists_and_has_a_docstring() -> None:
    for name in vit_static.__all__:
        value = getattr(vit_static, name)
        assert value is not None
        if callable(value):
            assert value.__doc__, name
        assert name in str(vit_static.__doc__) + PAGE.read_text(encoding="utf-8") or name == "__version__", name
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        _ = vit_static.evalute


def test_build_takes_names_configs_and_keys() -> None:
    layer = vit_static.build("S/16", num_classes=10, image_size=(32, 48), depth=2)
    assert (len(layer.blocks), layer.grid) == (2, (2, 3))
    config = vit_static.load_config("quickstart", ["model.num_classes=7"])
    for same in (vit_static.build(config), vit_static.build(config.model)):
        assert same.head.weight.shape == [128, 7]
    assert vit_static.build(config, num_classes=3).head.weight.shape == [128, 3]
    for keys, message in ((("S/15",), r"^model\.variant = 'S/15'"), (("S/16", "depht"), r"^model\.depht is not a key")):
        with pytest.raises(ConfigError, match=message):
            vit_static.build(keys[0], **dict.fromkeys(keys[1:], 2))


def test_messages_name_functions_of_python(tmp_path: Path) -> None:
    """Where the command line's name its options."""
    run, exported = tmp_path / "run", tmp_path / "exported"
    for path in (run / "model.pdparams", exported / "model.pdiparams", tmp_path / "other/notes.txt"):
        path.parent.mkdir()
        path.touch()
    for folder, message in (
        (run, rf"^{run}: is a run, not an exported model; export it first: vit_static\.export\({run}, DIR\)$"),
        (tmp_path / "other", r"vit_static\.load takes a folder that vit_static\.export wrote$"),
    ):
        with pytest.raises(PredictError, match=message):
            vit_static.load(folder)
    with pytest.raises(WeightsError, match=r"is an exported model, for predict and serve; name the run"):
        vit_static.load_weights(exported)
    with pytest.raises(WeightsError, match=r"train first \(vit_static\.train makes"):
        vit_static.load_weights(tmp_path / "other")
    for text, words in (
        ("start it again with --resume never", 'start it again with resume="never"'),
        ("export it again with -o export.precision=int8", 'export it again with overrides=["export.precision=int8"]'),
        ("no moving average; leave --ema out", "no moving average; leave ema out"),
        ("check it with './run.sh eval'", "check it with vit_static.evaluate"),
    ):
        assert for_python(text) == words


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: vit_static.train("quickstart"),
            r"^config = 'quickstart': must be a config, as vit_static\.load_config",
        ),
        (lambda: vit_static.load_config(3), r"^path = 3: must be a path \(str or pathlib\.Path\)$"),
        (lambda: vit_static.load_config(None, "train.epochs=5"), r"^overrides = 'train\.epochs=5': must be a list"),
        (
            lambda: vit_static.load_config(None, {"train.epochs": 5}),
            r"^overrides = {'train\.epochs': 5}: must be a list",
        ),
        (lambda: vit_static.load_config(None, [5]), r"must be a list of settings, such as"),  # type: ignore[list-item]
        (lambda: vit_static.build(3), r"^model = 3: must be a name in vit_static\.VARIANTS or a config$"),
        (lambda: vit_static.load(None), r"^folder = None: must be a path"),
        (lambda: vit_static.load("model", num_threads=0), r"^num_threads = 0: must be None or a number above 0$"),
        (lambda: vit_static.load("model", precision="fp16"), r"^precision = 'fp16': must be one of float32, "),
        (lambda: vit_static.load_weights(3), r"^source = 3: must be a path"),
        (lambda: vit_static.load_weights("run", config="own.yaml"), r"^config = 'own\.yaml': must be a config"),
        (lambda: vit_static.evaluate("run", which="bst"), r"^which = 'bst': must be \"best\" or \"last\"$"),
        (lambda: vit_static.export("run", None), r"^folder = None: must be a path"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_exported_model_says_what_has_its_attention() -> None:
    model = Predictor.__new__(Predictor)
    for name in ("attention", "draw_attention", "layer"):
        with pytest.raises(AttributeError, match=rf"load_weights\(RUN\)\.{name} has it: see configs/PYTHON\.md"):
            getattr(model, name)
    with pytest.raises(AttributeError, match=r"^'Predictor' object has no attribute 'atention'$"):
        _ = model.atention  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path: Path) -> None:
    lines = run_forked(examples(), tmp_path)
    assert re.fullmatch(r"output/quickstart \d+\.\d+", next(line for line in lines if line.startswith("output/quick")))
    assert sum(line.startswith("['") for line in lines) == 4  # predictions
    assert (tmp_path / "attention.png").is_file() and (tmp_path / "exported/vit_static.json").is_file()
    # The page's comment at the end of its last example is what is printed.
    comment = PAGE.read_text(encoding="utf-8").rpartition("print(error)  # ")[2].partition(" ...\n")[0]
    assert lines[-1].startswith(comment)


@pytest.mark.slow
def test_an_interrupted_training_saves_before_the_interrupt_is_raised(tmp_path: Path) -> None:
    first, second = run_forked(INTERRUPTED, tmp_path)
    assert "stopped" in first and second == "1 checkpoint"


@pytest.mark.slow
def test_images_and_numbers_that_are_none_are_named(exported: Exported) -> None:
    model = vit_static.load_weights(exported.run)
    for call, message in (
        (lambda: model([3]), r"^3: is no image; pass paths, Pillow images or arrays$"),  # type: ignore[list-item]
        (lambda: model(3), r"^3: is no list of images; pass \[image, \.\.\.\]$"),
        (lambda: model(["3.jpeg"], top_k=0), r"^top_k = 0: must be None or a whole number above 0$"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_weights_predict_as_their_export_does(exported: Exported) -> None:
    """And their attention is that of `visualize`."""
    images = exported.validation_images()[:5]
    model = vit_static.load_weights(exported.run)
    expected = in_inference_process(probabilities, exported.folder, images)
    np.testing.assert_allclose(model.probabilities(images), expected, atol=1e-6)
    assert [each.classes[0] for each in model(images)] == expected.argmax(axis=1).tolist()
    assert model.features(images).shape == (5, model.spec.model.width)
    recording, _ = load_checkpoint(None, exported.run, [])
    inputs = model.preprocess([np.full((20, 40, 3), 7, np.uint8)])
    np.testing.assert_array_equal(
        model.attention([np.full((20, 40, 3), 7, np.uint8)]), attention_map(recording, inputs)
    )
    # What is changed in the layer counts.
    model.layer.head.bias.set_value(model.layer.head.bias + np.eye(10, dtype=np.float32)[4] * 1e3)
    assert [each.classes[0] for each in model(images)] == [4] * 5


def probabilities(folder: Path, images: list[Path]) -> np.ndarray:
    return vit_static.load(folder).probabilities(images)


def outputs(cell: Any) -> list[str]:
    return [output["output_type"] + str(output.get("name", "")) for output in cell.get("outputs", [])]


@pytest.mark.slow
def test_the_notebook_runs(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From weights to a prediction and an attention map, with the small model in place of the quickstart's."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = [outputs(cell) for cell in notebook.cells]
    for name, target in (("output/quickstart", exported.run), ("data/digits", exported.digits)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(target)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)  # the kernel's folder, too; the path of a socket is limited to 107 bytes
    settings = TraitletsConfig({"KernelManager": {"transport": "ipc", "ip": "kernel"}})
    NotebookClient(notebook, config=settings, timeout=240, kernel_name="python3").execute()
    # The same outputs as those stored, and nothing of Paddle's among them.
    assert [outputs(cell) for cell in notebook.cells] == stored
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert len(re.findall(r"^\d: \w+, \d+\.\d %$", text, re.MULTILINE)) == 10
    shares = notebook.cells[-1].outputs[-1]["data"]
    assert "image/png" in shares

"""Damaged folders of exported models, which are read or refused in one line."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.bad_input import Trial, cases, damaged, json_values, pytestmark  # noqa: F401
from helpers.exported import in_inference_process, probabilities_shape, run_predict
from helpers.forked_verbs import run_verb
from helpers.small import SMALL
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vit_static.common.errors import PredictError
from vit_static.common.text import path_of
from vit_static.config.schema import Config
from vit_static.export.exporter import write_artifact
from vit_static.inference.artifact import MODEL_FILE, SPEC_FILE, WEIGHTS_FILE, read_spec, spec_of
from vit_static.model.vit import VisionTransformer

MODEL = SMALL.model_copy(update={"representation_size": None, "layer_scale_init": None})
FILES = (MODEL_FILE, WEIGHTS_FILE, SPEC_FILE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Return the files of three exports of a small model, whose weights are `plain`, `other` and `nan`."""
    files = {}
    for name in ("plain", "other", "nan"):
        folder = tmp_path_factory.mktemp(name)
        model = VisionTransformer(MODEL)
        if name == "nan":
            model.set_state_dict({key: value * float("nan") for key, value in model.state_dict().items()})
        model.eval()
        config = Config(name="x", model=MODEL)
        write_artifact(model, config, spec_of(config, [f"class {label}" for label in range(5)]), folder)
        files[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files


@pytest.fixture(scope="module")
def accepts_model(trial: Trial) -> Callable[..., None]:
    """Return a function that tries a folder with these files, up to the probabilities of an image.

    It takes the kind of case, the files' contents (None: missing), and names of which a refusal must contain one.
    """
    folder = trial.folder / "model"
    folder.mkdir()

    def accepts(kind: str, files: dict[str, bytes | None], *names: str) -> None:
        for name, content in files.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        with trial.of(kind, *(names or [str(folder)])):
            assert in_inference_process(probabilities_shape, folder) == (1, 5)

    accepts.folder = folder  # type: ignore[attr-defined]
    return accepts


@cases(150)
@given(st.sampled_from(FILES), st.sampled_from(["damage", "damage", "damage", "none", "other", "any"]), st.data())
def test_damaged_model_folders(accepts_model, exported: Any, name: str, harm: str, data: st.DataObject) -> None:
    """Paddle Inference gets no damaged file, which would end the process."""
    files = exported["plain"]
    content = {
        "damage": lambda: damaged(files[name], data.draw),
        "none": lambda: None,
        "other": lambda: exported["other"][name],
        "any": lambda: data.draw(st.binary(max_size=50)),
    }[harm]()
    is_same = content == files[name]
    accepts_model("model folders: files", {**files, name: content}, *([] if is_same else [name, SPEC_FILE]))
    if name != SPEC_FILE and not is_same:
        with pytest.raises(PredictError, match=r"no such file|damaged"):
            in_inference_process(probabilities_shape, accepts_model.folder)


spec_values = json_values | st.sampled_from(
    [[1e-30] * 3, [1e30] * 3, [24, 16], [100_000] * 2, ["a"] * 5, ["\x1b"] * 5, [7] * 5]
)


@cases(150)
@given(st.data())
def test_specs_of_any_values(accepts_model, exported: Any, data: st.DataObject) -> None:
    spec = json.loads(exported["plain"][SPEC_FILE])
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(
            st.sampled_from([(), ("preprocessing",), ("preprocessing",), ("model",), ("files",), ("files", MODEL_FILE)])
        )
        section = functools.reduce(lambda outer, key: outer.get(key, {}) if isinstance(outer, dict) else {}, path, spec)
        if not isinstance(section, dict) or not section:
            continue
        key = data.draw(st.sampled_from(sorted(section)))
        if data.draw(st.integers(0, 5)) == 0:
            del section[key]
        else:
            section[key] = data.draw(spec_values)
    accepts_model("model folders: specs", {**exported["plain"], SPEC_FILE: json.dumps(spec).encode()})


@pytest.mark.parametrize("size", [[16, 16], [24, 32], [4, 4], [400, 16], [60_000, 60_000]])
def test_a_spec_with_another_image_size_is_refused(accepts_model, exported: Any, size: list[int]) -> None:
    spec = json.loads(exported["plain"][SPEC_FILE])
    spec["preprocessing"]["image_size"] = spec["model"]["image_size"] = size
    other = {**exported["plain"], SPEC_FILE: json.dumps(spec).encode()}
    accepts_model("model folders: specs", other, "can't run on images of", "more than")


ABSURD_SIZES = [
    {"depth": 10**9},
    {"depth": 10**400},
    {"width": 10**9, "num_heads": 1},
    {"mlp_dim": 10**9},
    {"register_tokens": 10**9},
    {"representation_size": 10**9},
    {"depth": 10**9, "pos_embed": "sincos2d"},
    {"num_heads": 10**9},
]


@pytest.mark.parametrize("changed", ABSURD_SIZES, ids=lambda changed: "-".join(changed))
def test_absurd_sizes_are_refused_by_every_verb_that_opens_the_folder(
    exported: Any, changed: dict[str, Any], tmp_path: Path
) -> None:
    """The refusal comes from `read_spec`, before a layer of the model is made."""
    spec = json.loads(exported["plain"][SPEC_FILE])
    spec["model"].update(changed)
    for name, content in {**exported["plain"], SPEC_FILE: json.dumps(spec).encode()}.items():
        (tmp_path / name).write_bytes(content)
    image = tmp_path / "image.png"
    Image.new("RGB", (20, 20)).save(image)
    verbs = (
        ("predict", "--model", tmp_path, image),
        ("serve", "--model", tmp_path, "--port", 0),
        ("visualize", "--model", tmp_path, "--out", tmp_path / "out", image),
        ("probe", "--model", tmp_path),
    )
    # All verbs for one case; `predict`, whose program has its own sizes, must not be the only one.
    for verb in verbs if changed == ABSURD_SIZES[0] else ():
        finished = run_verb(*verb, cwd=tmp_path, timeout_s=60)
        assert (finished.returncode, finished.stdout) == (2, ""), (verb[0], finished.stderr)
        assert SPEC_FILE in finished.stderr and len(finished.stderr.splitlines()) == 1
    with pytest.raises(PredictError, match=r"larger model than|does not describe an exported model"):
        read_spec(tmp_path)


def test_an_older_export_is_refused_with_the_remedy(accepts_model, exported: Any) -> None:
    spec = json.loads(exported["plain"][SPEC_FILE])
    del spec["format"]
    older = {**exported["plain"], SPEC_FILE: json.dumps(spec).encode()}
    accepts_model(
        "model folders: specs", older, "another version's export, and this version reads format 2; export it again"
    )


def test_nan_gives_an_error_instead_of_probabilities(tmp_path: Path, exported: Any) -> None:
    """The line is valid JSON for any parser, also for a file name that is not UTF-8, whose bytes it has."""
    for name, content in exported["nan"].items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "\udcff.png")
    exit_code, output = in_inference_process(run_predict, tmp_path, [tmp_path])
    assert exit_code == 2
    (line,) = output.splitlines()
    result = json.loads(line, parse_constant=pytest.fail)
    assert line.isprintable() and result["path"] == f"{tmp_path}/\\xff.png" and "NaN" in result["error"]
    assert path_of(result) == f"{tmp_path}/\udcff.png"


def test_a_model_without_position_embedding_is_not_missing_one(tmp_path: Path) -> None:
    """Though a table for so many patches would be larger than the rest of the model."""
    rotary = {"rope": "mixed", "pos_embed": "none", "pos_embed_init": "normal", "image_size": (512, 512)}
    config = Config(name="x", model=MODEL.model_copy(update=rotary))
    model = VisionTransformer(config.model)
    model.eval()
    write_artifact(model, config, spec_of(config, [f"class {label}" for label in range(5)]), tmp_path)
    assert read_spec(tmp_path).model.pos_embed == "none"

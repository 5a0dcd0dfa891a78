"""Malformed exported model folders are read, or refused in one line."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.bad_input import Trial, card_values, cases, damaged, pytestmark  # noqa: F401
from helpers.exported import elsewhere, printed, shape_of_answer
from helpers.small import SMALL
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vit_static.common.errors import PredictError
from vit_static.config.schema import Config
from vit_static.export.exporter import write
from vit_static.inference.artifact import MODEL_FILE, SPEC_FILE, WEIGHTS_FILE, spec_of
from vit_static.model.vit import VisionTransformer

MODEL = SMALL.model_copy(update={"representation_size": None, "layer_scale_init": None})
FILES = (MODEL_FILE, WEIGHTS_FILE, SPEC_FILE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of three exports of a small model: `one`, `other` weights, and `nan` ones."""
    found = {}
    for name in ("one", "other", "nan"):
        folder = tmp_path_factory.mktemp(name)
        model = VisionTransformer(MODEL)
        if name == "nan":
            model.set_state_dict({key: value * float("nan") for key, value in model.state_dict().items()})
        model.eval()
        config = Config(name="x", model=MODEL)
        write(model, config, spec_of(config, [f"class {n}" for n in range(5)]), folder)
        found[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found


@pytest.fixture(scope="module")
def accepts_model(trial: Trial) -> Callable[..., None]:
    """accepts_model(kind, files, names...): one case, up to the probabilities of an image."""
    folder = trial.folder / "model"
    folder.mkdir()

    def accepts(kind: str, files: dict[str, bytes | None], *names: str) -> None:
        for name, content in files.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        with trial.of(kind, *(names or [str(folder)])):
            assert elsewhere(shape_of_answer, folder) == (1, 5)

    accepts.folder = folder  # type: ignore[attr-defined]
    return accepts


@cases(150)
@given(st.sampled_from(FILES), st.sampled_from(["damage", "damage", "damage", "none", "other", "any"]), st.data())
def test_damaged_model_folders(accepts_model, exported: Any, name: str, harm: str, data: st.DataObject) -> None:
    """Paddle is given no file that isn't what was written; it would end the process."""
    whole = exported["one"]
    changed = {
        "damage": lambda: damaged(whole[name], data.draw),
        "none": lambda: None,
        "other": lambda: exported["other"][name],
        "any": lambda: data.draw(st.binary(max_size=50)),
    }[harm]()
    same = changed == whole[name] or (name == MODEL_FILE and harm == "other" and changed == whole[name])
    accepts_model("model folders: files", {**whole, name: changed}, *([] if same else [name, SPEC_FILE]))
    if name != SPEC_FILE and not same:
        with pytest.raises(PredictError, match=r"no such file|damaged"):
            elsewhere(shape_of_answer, accepts_model.folder)


card_values |= st.sampled_from([[1e-30] * 3, [1e30] * 3, [24, 16], [100_000] * 2, ["a"] * 5, ["\x1b"] * 5, [7] * 5])


@cases(150)
@given(st.data())
def test_cards_of_any_values(accepts_model, exported: Any, data: st.DataObject) -> None:
    card = json.loads(exported["one"][SPEC_FILE])
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(
            st.sampled_from([(), ("preprocessing",), ("preprocessing",), ("model",), ("files",), ("files", MODEL_FILE)])
        )
        inside = functools.reduce(lambda found, key: found.get(key, {}) if isinstance(found, dict) else {}, place, card)
        if not isinstance(inside, dict) or not inside:
            continue
        key = data.draw(st.sampled_from(sorted(inside)))
        if data.draw(st.integers(0, 5)) == 0:
            del inside[key]
        else:
            inside[key] = data.draw(card_values)
    accepts_model("model folders: cards", {**exported["one"], SPEC_FILE: json.dumps(card).encode()})


@pytest.mark.parametrize("size", [[16, 16], [24, 32], [4, 4], [400, 16], [60_000, 60_000]])
def test_a_card_of_another_image_size_is_refused(accepts_model, exported: Any, size: list[int]) -> None:
    card = json.loads(exported["one"][SPEC_FILE])
    card["preprocessing"]["image_size"] = card["model"]["image_size"] = size
    other = {**exported["one"], SPEC_FILE: json.dumps(card).encode()}
    accepts_model("model folders: cards", other, "can't be run on images of", "more than")


def test_an_older_export_is_refused_with_the_remedy(accepts_model, exported: Any) -> None:
    card = json.loads(exported["one"][SPEC_FILE])
    del card["files"]
    older = {**exported["one"], SPEC_FILE: json.dumps(card).encode()}
    accepts_model("model folders: cards", older, "older version's export, without the sizes and digests")


def test_what_is_no_number_is_no_probability(tmp_path: Path, exported: Any) -> None:
    """A model of NaN gives its images lines with an error, which are JSON; so does a name that is no text."""
    for name, content in exported["nan"].items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "\udcff.png")
    code, output = elsewhere(printed, tmp_path, [tmp_path])
    assert code == 2
    (line,) = output.splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert found["path"].endswith("\udcff.png") and "no numbers" in found["error"]

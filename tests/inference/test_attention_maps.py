"""What a model attends to, against NumPy, closed forms and the verb as it is typed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import paddle
import pytest
from helpers import numpy_vit
from helpers.models import KINDS, config_of, recording_model, without_recorder
from helpers.sets import photo
from helpers.small import ROOT, SMALL, images_and_labels, model_logits
from PIL import Image

from vit_static.cli import make_parser
from vit_static.common import drawing
from vit_static.common.errors import PredictError, UserError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config, ModelConfig
from vit_static.export.exporter import write
from vit_static.inference.artifact import SPEC_FILE, spec_of
from vit_static.inference.attention_maps import (
    attention_map,
    distinct_stems,
    draw_similarity,
    head_maps,
    load_exported,
    observe,
    patch_filters,
    pixels_of,
    position_similarity,
    rollout,
    visualize,
)
from vit_static.inference.predictor import Preprocessor
from vit_static.model.vit import VisionTransformer
from vit_static.weights.load import file_state

# Which tokens the head reads, and how many stand before the patches.
READS = {
    "class token": ([0], 1),
    "average": (range(12), 0),
    "average beside a class token": (range(1, 13), 1),
    "both": ([0], 1),
    "registers, a class token without position": ([2], 3),
    "average beside registers": (range(3, 15), 3),
    "fixed positions": ([0], 1),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def numpy_attention(model: VisionTransformer, images: np.ndarray) -> list[np.ndarray]:
    """Of each layer, [B, H, N, N]."""
    state = {"pos_embed": model.pos_embed.numpy(), **file_state(model)}
    if model.fc_norm or model.pool == "cls_gap":  # only the last norm and the head differ, which come after it
        width = state["pos_embed"].shape[2]
        state |= {"norm.weight": np.ones(width), "norm.bias": np.zeros(width)}
        state = {name: value for name, value in state.items() if not name.startswith("head")}
        state |= {"head.weight": np.zeros((width, 1)), "head.bias": np.zeros(1)}
    found: list[np.ndarray] = []
    numpy_vit.logits(state, images, patch_size=4, num_heads=3, attention=found)
    return found


@kinds
def test_the_recorded_weights_are_those_of_the_paper_s_equations(kind: str) -> None:
    model = recording_model(config_of(kind))
    images = images_and_labels(2)[0].numpy()
    seen = observe(model, images)
    expected = numpy_attention(model, images)
    assert len(seen.layers) == len(expected) == 2
    for layer, heads in zip(seen.layers, expected, strict=True):
        np.testing.assert_allclose(layer, heads.mean(axis=1), atol=2e-5)
        np.testing.assert_allclose(layer.sum(axis=-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(seen.last_heads, expected[-1], atol=2e-5)
    np.testing.assert_allclose(seen.last_heads.sum(axis=-1), 1.0, atol=1e-5)
    assert seen.last_heads.max() > 2.0 / seen.last_heads.shape[-1]  # else an average over anything would do
    expected_logits = model_logits(without_recorder(model, config_of(kind)), paddle.to_tensor(images))
    np.testing.assert_allclose(seen.logits, expected_logits, atol=1e-4)


@kinds
def test_the_maps_are_of_what_the_head_reads(kind: str) -> None:
    """The product of whole matrices in float64, against ours from the query's side."""
    model = recording_model(config_of(kind), seed=1)
    images = images_and_labels(3, seed=1)[0].numpy()
    attention = numpy_attention(model, images)
    tokens, prefix = list(READS[kind][0]), READS[kind][1]
    num_tokens = attention[0].shape[-1]
    assert num_tokens == prefix + 12
    expected = np.zeros((3, 12))
    for image in range(3):
        product = np.eye(num_tokens)
        for layer in attention:
            product = (0.5 * layer[image].mean(axis=0) + 0.5 * np.eye(num_tokens)) @ product
        expected[image] = product[tokens].mean(axis=0)[prefix:]
    expected /= expected.sum(axis=1, keepdims=True)
    found = attention_map(model, images)
    assert found.shape == (3, 3, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected.reshape(3, 3, 4), atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=(1, 2)), 1.0, atol=1e-6)
    heads = attention[-1][:, :, tokens].mean(axis=2)[..., prefix:].reshape(3, 3, 3, 4)
    np.testing.assert_allclose(head_maps(model, observe(model, images)), heads, atol=2e-5)


@pytest.mark.parametrize("depth", [1, 3, 12])
def test_rollout_where_all_attend_to_one_token(depth: int) -> None:
    """A layer leaves half of the class token where it is, and sends half to that token."""
    everyone = np.zeros((1, 6, 6), np.float32)
    everyone[:, :, 4] = 1.0
    found = rollout([everyone] * depth, np.eye(6)[0])[0]
    np.testing.assert_allclose(found, [0.5**depth, 0, 0, 0, 1 - 0.5**depth, 0], atol=1e-15)


def test_rollout_takes_the_layers_in_their_order() -> None:
    """The last layer's class token looks at token 1, whose state the first layer has fetched from token 2."""
    first, last = np.eye(3, dtype=np.float32)[None], np.eye(3, dtype=np.float32)[None]
    first[0, 1], last[0, 0] = [0, 0, 1], [0, 1, 0]
    np.testing.assert_allclose(rollout([first, last], np.eye(3)[0]), [[0.5, 0.25, 0.25]], atol=1e-15)


def test_a_model_that_attends_to_all_alike_has_a_flat_map() -> None:
    model = recording_model(SMALL)
    for block in model.blocks:
        block.attn.q.weight.set_value(paddle.zeros_like(block.attn.q.weight))
        block.attn.q.bias.set_value(paddle.zeros_like(block.attn.q.bias))
    np.testing.assert_allclose(attention_map(model, images_and_labels(2)[0].numpy()), 1.0 / 12.0, rtol=1e-5)


def test_threads_with_a_lock_get_what_one_gets_alone() -> None:
    model, lock = recording_model(SMALL), Lock()
    batches = [images_and_labels(1 + seed % 3, seed=seed)[0].numpy() for seed in range(12)]
    alone = [attention_map(model, images) for images in batches]

    def locked(images: np.ndarray) -> np.ndarray:
        with lock:
            return attention_map(model, images)

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(locked, batches))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_model_that_records_nothing_is_refused() -> None:
    with pytest.raises(TypeError, match="AttentionRecorder"):
        attention_map(VisionTransformer(SMALL), images_and_labels(1)[0].numpy())


@kinds
def test_position_similarity_is_the_cosine_of_the_patches_alone(kind: str) -> None:
    model = recording_model(config_of(kind))
    table = model.pos_embed.numpy()[0].astype(np.float64)
    table = table[len(table) - 12 :]
    found = position_similarity(model)
    assert found.shape == (3, 4, 3, 4)
    for one in range(12):
        for other in range(12):
            cosine = table[one] @ table[other] / np.sqrt((table[one] ** 2).sum() * (table[other] ** 2).sum())
            assert found[one // 4, one % 4, other // 4, other % 4] == pytest.approx(cosine, abs=1e-12)


def test_position_similarity_of_centred_rows_is_their_correlation_and_of_no_row_nothing() -> None:
    model = recording_model(SMALL)
    table = np.random.default_rng(0).standard_normal((1, 13, 24))
    table -= table.mean(axis=2, keepdims=True)
    model.pos_embed.set_value(table.astype(np.float32))
    np.testing.assert_allclose(position_similarity(model).reshape(12, 12), np.corrcoef(table[0, 1:]), atol=1e-6)
    table[0, 5] = 0.0
    model.pos_embed.set_value(table.astype(np.float32))
    assert not position_similarity(model)[1, 0].any()


def test_filters_are_the_covariance_s_eigenvectors() -> None:
    model = recording_model(SMALL)
    kernel = model.patch_embed.proj.weight.numpy().astype(np.float64).reshape(24, 48)
    values, vectors = np.linalg.eigh(np.cov(kernel.T))
    found, shares = patch_filters(model)
    assert found.shape == (23, 3, 4, 4)  # 24 filters less their mean
    for number in range(23):
        flat = found[number].ravel()
        assert abs(flat @ vectors[:, -1 - number]) == pytest.approx(1.0, abs=1e-6)
        assert flat[np.abs(flat).argmax()] > 0.0
    np.testing.assert_allclose(shares, values[::-1][:23] / values.sum(), atol=1e-9)


def test_filters_made_of_known_patterns_give_them_back() -> None:
    """Cosines across and down the patch, and a colour, with standard deviations of 3, 2, 1 around a common filter."""
    model = recording_model(ModelConfig.model_validate({**SMALL.model_dump(), "width": 192, "num_heads": 3}))
    wave = np.cos(np.pi * (np.arange(4) + 0.5) / 4)
    patterns = np.zeros((3, 3, 4, 4))
    patterns[0], patterns[1] = wave[None, None, :], wave[None, :, None]
    patterns[2, 0], patterns[2, 2] = 1.0, -1.0
    patterns /= np.sqrt((patterns**2).sum(axis=(1, 2, 3), keepdims=True))
    amounts = np.linalg.qr(np.random.default_rng(0).standard_normal((192, 4)) * [0, 1, 1, 1] + [1, 0, 0, 0])[0][:, 1:]
    kernel = 0.7 + np.einsum("nk,kcyx->ncyx", amounts * [3, 2, 1], patterns)
    model.patch_embed.proj.weight.set_value(kernel.astype(np.float32))
    found, shares = patch_filters(model, most=3)
    np.testing.assert_allclose(shares, np.array([9, 4, 1]) / 14, atol=1e-6)
    for pattern, component in zip(patterns, found, strict=True):
        assert abs((pattern * component).sum()) == pytest.approx(1.0, abs=1e-6)


@kinds
def test_weights_come_back_from_an_export(kind: str, tmp_path: Path) -> None:
    """Also of a model that is not the first of its process, whose layers have other numbers in Paddle's names."""
    config = Config.model_validate({"name": "small", "model": config_of(kind).model_dump()})
    model = recording_model(config.model)
    write(without_recorder(model, config.model), config, spec_of(config, list("abcde")), tmp_path)
    again, card = load_exported(tmp_path)
    assert card.model == config.model
    mine, theirs = file_state(model), file_state(again)
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)
    images = images_and_labels(2)[0].numpy()
    assert np.array_equal(attention_map(model, images), attention_map(again, images))


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"depth": 3}, "has no parameter blocks.2"), ({"num_heads": 2}, "doesn't compute what its card says")],
)
def test_an_export_with_another_model_s_card_is_refused(tmp_path: Path, changed: dict[str, int], said: str) -> None:
    config = Config.model_validate({"name": "small", "model": SMALL.model_dump()})
    write(
        without_recorder(recording_model(config.model), config.model), config, spec_of(config, list("abcde")), tmp_path
    )
    card = json.loads((tmp_path / SPEC_FILE).read_text())
    card["model"].update(changed)
    (tmp_path / SPEC_FILE).write_text(json.dumps(card))
    with pytest.raises(PredictError, match=said):
        load_exported(tmp_path)


def test_the_picture_is_the_crop_that_the_model_saw() -> None:
    """Of an image twice as large the middle half, as Pillow cuts it out; with a mean and deviation a channel."""
    config = load_config(
        None,
        ["model.image_size=64", "eval.crop_pct=0.5", "data.mean=[0.4,0.5,0.6]", "data.std=[0.2,0.3,0.1]"],
    )
    preprocessing = spec_of(config, [str(number) for number in range(1000)]).preprocessing
    pixels = np.asarray(photo(128, 160))
    shown = pixels_of(Preprocessor(preprocessing, 1)([pixels])[0], preprocessing)
    assert np.array_equal(shown, pixels[32:96, 48:112])


def test_colours_get_lighter_all_the_way() -> None:
    luma = drawing.colours(np.linspace(0.0, 1.0, 101)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(luma) > 0).all() and luma[0] < 20 and luma[-1] > 230
    assert np.array_equal(drawing.colours(np.array([-3.0, 7.0])), drawing.colours(np.array([0.0, 1.0])))


def test_the_heat_lies_where_the_patch_does() -> None:
    picture = np.zeros((40, 60, 3), np.uint8)
    values = np.zeros((2, 3))
    values[1, 2] = 1.0
    for drawn in (drawing.heat(picture, values), drawing.darkened(picture + 255, values)):
        assert drawn.shape == picture.shape
        means = drawn.mean(axis=2).reshape(2, 20, 3, 20).mean(axis=(1, 3))
        assert np.unravel_index(means.argmax(), means.shape) == (1, 2)
        assert means[1, 2] > 2.0 * means[0, 0]


def test_the_grid_of_grids_is_lightest_at_each_one_s_own_place() -> None:
    picture = draw_similarity(position_similarity(recording_model(SMALL)))
    (lightest,) = drawing.colours(np.array([1.0]))
    is_lightest = (picture == lightest).all(axis=2)
    # 50 pixels a patch; 4 x 3 maps of 4 x 3 patches, 10 pixels apart, from (12, 52) on
    for row in range(3):
        for column in range(4):
            top, left = 52 + row * 160 + row * 50, 12 + column * 210 + column * 50
            assert is_lightest[top : top + 50, left : left + 50].all()
    assert is_lightest[:, : 12 + 4 * 210].sum() == 12 * 50 * 50


def test_stems_are_told_apart() -> None:
    paths = [Path(name) for name in ("a/cat.png", "b/cat.jpeg", "cat_2.png", "c/cat.png", "dog.x.png")]
    assert distinct_stems(paths) == ["cat", "cat_2", "cat_2_2", "cat_3", "dog.x"]


TINY = """
model: {variant: Ti/16, image_size: 16, patch_size: 8, width: 32, depth: 2, num_heads: 2, mlp_dim: 64, num_classes: 10}
data: {global_batch_size: 16, num_threads: 1}
train: {max_steps: 8}
"""


def run_verb(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As run.sh starts it."""
    return subprocess.run(
        [sys.executable, "-m", "vit_static", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Path:
    """A folder with a trained model and its export, and with images, a bad one and two of one name among them."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    (folder / "tiny.yaml").write_text(TINY)
    trained = run_verb(folder, "pretrain", "-c", "tiny.yaml", "-o", f"data.root={small_digits}")
    assert trained.returncode == 0, trained.stderr
    exported = run_verb(folder, "export", "--checkpoint", "output/tiny", "--out", "exported")
    assert exported.returncode == 0, exported.stderr
    for name, digit in (("one.png", 1), ("more/one.jpeg", 7), ("two words.jpeg", 2)):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.open(next((small_digits / "val" / str(digit)).iterdir())).resize((90, 70)).save(folder / name)
    (folder / "bad.jpeg").write_bytes(b"no image")
    (folder / "bare").mkdir()
    shutil.copy(folder / "output/tiny/model.pdparams", folder / "bare/weights.pdparams")
    return folder


IMAGES = ("one.png", "bad.jpeg", "more", "two words.jpeg")
DRAWN = [f"{name}_{what}.png" for name in ("one", "one_2", "two words") for what in ("rollout", "heads")]


def test_a_run_and_its_export_give_the_same_pictures(workplace: Path) -> None:
    told = {}
    for way, given in {"run": ["--checkpoint", "output/tiny"], "export": ["--model", "exported"]}.items():
        done = run_verb(workplace, "visualize", *given, *IMAGES, "--out", f"out/{way}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "1 images" in done.stderr
        lines = done.stdout.splitlines()
        files = ["position_similarity.png", "patch_filters.png", *DRAWN]
        assert [line for line in lines if line[0] != "{"] == [f"out/{way}/{name}" for name in files]
        assert sorted(path.name for path in (workplace / "out" / way).iterdir()) == sorted(files)
        told[way] = [json.loads(line) for line in lines if line[0] == "{"]
    for name in files:
        one, other = (workplace / "out" / way / name for way in told)
        assert one.read_bytes() == other.read_bytes()
        with Image.open(one) as picture:
            assert picture.format == "PNG" and min(picture.size) > 100
    for one, other in zip(*told.values(), strict=True):
        assert one == other
    assert [line["path"] for line in told["run"]] == ["one.png", "bad.jpeg", "more/one.jpeg", "two words.jpeg"]
    assert "bad.jpeg" in told["run"][1]["error"]


def test_it_predicts_what_predict_does(workplace: Path) -> None:
    done = run_verb(workplace, "visualize", "--model", "exported", "one.png", "more", "two words.jpeg")
    assert done.returncode == 0 and done.stderr == ""
    assert (workplace / "visualize" / "one_rollout.png").is_file()
    found = [json.loads(line) for line in done.stdout.splitlines() if line[0] == "{"]
    arguments = ["predict", "--model", "exported", "--top-k", "1", "one.png", "more", "two words.jpeg"]
    predicted = run_verb(workplace, *arguments)
    for mine, line in zip(found, predicted.stdout.splitlines(), strict=True):
        theirs = json.loads(line)
        assert mine["path"] == theirs["path"] and mine["top"][0]["name"] == theirs["top"][0]["name"]
        assert mine["top"][0]["probability"] == pytest.approx(theirs["top"][0]["probability"], abs=1e-5)


def test_a_file_of_weights_with_its_config_does_as_well(workplace: Path) -> None:
    given = ["--checkpoint", "bare/weights.pdparams", "-c", "tiny.yaml", "--out", "out/bare"]
    done = run_verb(workplace, "visualize", *given, "one.png")
    assert done.returncode == 0, done.stderr
    assert (workplace / "out/bare/position_similarity.png").is_file()
    assert json.loads(done.stdout.splitlines()[-1])["top"][0]["name"].isdigit()  # no names lie beside the file


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one.png"], "--model --checkpoint is required"),
        (["--model", "exported", "--checkpoint", "output/tiny", "one.png"], "not allowed with"),
        (["--model", "exported", "-o", "seed=1", "one.png"], "go with --checkpoint"),
        (["--model", "output/tiny", "one.png"], "a folder that './run.sh export' wrote"),
        (["--checkpoint", "nowhere", "one.png"], "nowhere: no such file or folder"),
        (["--checkpoint", "bare/weights.pdparams", "one.png"], "with -c"),
        (["--model", "exported", "one.png", "--out", "tiny.yaml"], "--out takes a folder"),
    ],
)
def test_mistakes_say_what_to_do(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(workplace)
    with pytest.raises(UserError, match=said) as error:
        given = make_parser().parse_args(["visualize", *arguments])
        visualize(None, given.model, given.checkpoint, given.images, given.out, given.overrides)
    assert "\n" not in str(error.value)


def test_a_missing_image_is_a_line_and_nothing_is_drawn(workplace: Path) -> None:
    done = run_verb(workplace, "visualize", "--model", "exported", "missing.png", "--out", "out/none")
    assert done.returncode == 2 and done.stdout == "" and not (workplace / "out/none").exists()
    assert done.stderr == "vit_static: missing.png: no such file or folder\n"

"""Attention maps and the other pictures of a model, against NumPy, closed forms and the command line."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import paddle
import pytest
from helpers import numpy_vit
from helpers.forked_verbs import run_verb
from helpers.models import KINDS, config_of, recording_model, without_recorder
from helpers.sets import photo
from helpers.small import SMALL, images_and_labels, model_logits
from helpers.tiny import tiny_model
from PIL import ExifTags, Image

from vit_static.cli.parser import make_parser
from vit_static.common import drawing
from vit_static.common.errors import PredictError, UserError
from vit_static.config.loader import load_config
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import Config
from vit_static.export.exporter import write_artifact
from vit_static.inference.artifact import SPEC_FILE, spec_of
from vit_static.inference.attention_maps import (
    attention_map,
    denormalize,
    draw_similarity,
    head_maps,
    load_exported,
    patch_filters,
    position_similarity,
    record_attention,
    rollout,
    unique_stems,
    visualize,
)
from vit_static.inference.predictor import Preprocessor
from vit_static.model.vit import VisionTransformer
from vit_static.weights.formats import read_weights
from vit_static.weights.load import file_state, write_pdparams

# The tokens that the head reads, and the number of tokens before the patches.
TOKENS_READ = {
    "class token": ([0], 1),
    "average": (range(12), 0),
    "average beside a class token": (range(1, 13), 1),
    "both": ([0], 1),
    "registers, a class token without position": ([2], 3),
    "a distillation token": ([1, 2], 3),
    "average beside registers": (range(3, 15), 3),
    "rotary positions and attention pooling": ([], 1),  # as its own weights say
    "mixed rotary positions and more norms": ([0], 1),
    "fixed positions": ([0], 1),
}
KIND_WITHOUT_POSITIONS = "rotary positions and attention pooling"
kinds = pytest.mark.parametrize("kind", KINDS)


def numpy_attention(model: VisionTransformer, images: np.ndarray) -> list[np.ndarray]:
    """Return the attention weights of each layer, [B, H, N, N], by NumPy; those of attention pooling are last."""
    state = file_state(model)
    if model.pos_embed is not None:
        state["pos_embed"] = model.pos_embed.numpy()
    if model.fc_norm or model.pool == "cls_gap":  # these change only the last norm and the head, which come after it
        width = len(state["blocks.0.norm1.weight"])
        state |= {"norm.weight": np.ones(width), "norm.bias": np.zeros(width)}
        state = {name: value for name, value in state.items() if not name.startswith("head")}
        state |= {"head.weight": np.zeros((width, 1)), "head.bias": np.zeros(1)}
    weights: list[np.ndarray] = []
    angles = numpy_vit.rotary_angles(model.config, state)
    gelu = model.config.gelu
    numpy_vit.logits(state, images, patch_size=4, num_heads=3, attention=weights, angles=angles, gelu=gelu)
    return weights


@kinds
def test_the_recorded_weights_follow_the_paper(kind: str) -> None:
    model = recording_model(config_of(kind))
    images = images_and_labels(2)[0].numpy()
    recorded = record_attention(model, images)
    expected = numpy_attention(model, images)
    pools = model.pool == "map"
    assert len(recorded.layers) == len(expected) - pools == 2
    for layer, heads in zip(recorded.layers, expected[:2], strict=True):
        np.testing.assert_allclose(layer, heads.mean(axis=1), atol=2e-5)
        np.testing.assert_allclose(layer.sum(axis=-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(recorded.last_heads, expected[-1], atol=2e-5)
    np.testing.assert_allclose(recorded.last_heads.sum(axis=-1), 1.0, atol=1e-5)
    assert recorded.last_heads.max() > 2.0 / recorded.last_heads.shape[-1]  # not uniform, which would hide mistakes
    expected_logits = model_logits(without_recorder(model, config_of(kind)), paddle.to_tensor(images))
    np.testing.assert_allclose(recorded.logits, expected_logits, atol=1e-4)


@kinds
def test_the_maps_belong_to_the_tokens_that_the_head_reads(kind: str) -> None:
    """The reference is the product of full matrices in float64, instead of vector by vector."""
    model = recording_model(config_of(kind), seed=1)
    images = images_and_labels(3, seed=1)[0].numpy()
    attention = numpy_attention(model, images)
    tokens, num_prefix = list(TOKENS_READ[kind][0]), TOKENS_READ[kind][1]
    num_tokens = attention[0].shape[-1]
    assert num_tokens == num_prefix + 12
    pooling = attention.pop() if model.pool == "map" else None
    expected = np.zeros((3, 12))
    for image in range(3):
        product = np.eye(num_tokens)
        for layer in attention:
            product = (0.5 * layer[image].mean(axis=0) + 0.5 * np.eye(num_tokens)) @ product
        read = product[tokens].mean(axis=0) if pooling is None else pooling[image, :, 0].mean(axis=0) @ product
        expected[image] = read[num_prefix:]
    expected /= expected.sum(axis=1, keepdims=True)
    maps = attention_map(model, images)
    assert maps.shape == (3, 3, 4) and maps.dtype == np.float32
    np.testing.assert_allclose(maps, expected.reshape(3, 3, 4), atol=1e-5)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), 1.0, atol=1e-6)
    read_by_head = attention[-1][:, :, tokens].mean(axis=2) if pooling is None else pooling[:, :, 0]
    heads = read_by_head[..., num_prefix:].reshape(3, 3, 3, 4)
    np.testing.assert_allclose(head_maps(model, record_attention(model, images)), heads, atol=2e-5)


@pytest.mark.parametrize("depth", [1, 3, 12])
def test_rollout_where_all_attend_to_one_token(depth: int) -> None:
    """Each layer keeps half of the class token, and takes half from that token."""
    weights = np.zeros((1, 6, 6), np.float32)
    weights[:, :, 4] = 1.0
    shares = rollout([weights] * depth, np.eye(6)[0])[0]
    np.testing.assert_allclose(shares, [0.5**depth, 0, 0, 0, 1 - 0.5**depth, 0], atol=1e-15)


def test_rollout_applies_the_layers_in_order() -> None:
    """In the last layer the class token attends to token 1, which attended to token 2 in the first layer."""
    first, last = np.eye(3, dtype=np.float32)[None], np.eye(3, dtype=np.float32)[None]
    first[0, 1], last[0, 0] = [0, 0, 1], [0, 1, 0]
    np.testing.assert_allclose(rollout([first, last], np.eye(3)[0]), [[0.5, 0.25, 0.25]], atol=1e-15)


def test_uniform_attention_has_a_uniform_map() -> None:
    model = recording_model(SMALL)
    for block in model.blocks:
        block.attn.q.weight.set_value(paddle.zeros_like(block.attn.q.weight))
        block.attn.q.bias.set_value(paddle.zeros_like(block.attn.q.bias))
    np.testing.assert_allclose(attention_map(model, images_and_labels(2)[0].numpy()), 1.0 / 12.0, rtol=1e-5)


def test_threads_with_a_lock_get_the_same_bits_as_one() -> None:
    model, lock = recording_model(SMALL), Lock()
    batches = [images_and_labels(1 + seed % 3, seed=seed)[0].numpy() for seed in range(12)]
    sequential = [attention_map(model, images) for images in batches]

    def locked(images: np.ndarray) -> np.ndarray:
        with lock:
            return attention_map(model, images)

    with ThreadPoolExecutor(4) as threads:
        parallel = list(threads.map(locked, batches))
    assert all(np.array_equal(maps, expected) for maps, expected in zip(parallel, sequential, strict=True))


def test_a_model_without_a_recorder_is_refused() -> None:
    with pytest.raises(TypeError, match="AttentionRecorder"):
        attention_map(VisionTransformer(SMALL), images_and_labels(1)[0].numpy())


@kinds
def test_position_similarity_is_the_cosine_of_the_patches(kind: str) -> None:
    model = recording_model(config_of(kind))
    if model.pos_embed is None:
        with pytest.raises(ValueError, match="no position embedding"):
            position_similarity(model)
        return
    table = model.pos_embed.numpy()[0].astype(np.float64)
    table = table[len(table) - 12 :]
    similarity = position_similarity(model)
    assert similarity.shape == (3, 4, 3, 4)
    for first in range(12):
        for second in range(12):
            norms = np.sqrt((table[first] ** 2).sum() * (table[second] ** 2).sum())
            cosine = table[first] @ table[second] / norms
            assert similarity[first // 4, first % 4, second // 4, second % 4] == pytest.approx(cosine, abs=1e-12)


def test_position_similarity_of_centred_rows_is_their_correlation_and_of_a_zero_row_zero() -> None:
    model = recording_model(SMALL)
    table = np.random.default_rng(0).standard_normal((1, 13, 24))
    table -= table.mean(axis=2, keepdims=True)
    model.pos_embed.set_value(table.astype(np.float32))
    np.testing.assert_allclose(position_similarity(model).reshape(12, 12), np.corrcoef(table[0, 1:]), atol=1e-6)
    table[0, 5] = 0.0
    model.pos_embed.set_value(table.astype(np.float32))
    assert not position_similarity(model)[1, 0].any()


def test_filters_are_the_eigenvectors_of_the_covariance() -> None:
    model = recording_model(SMALL)
    kernel = model.patch_embed.proj.weight.numpy().astype(np.float64).reshape(24, 48)
    values, vectors = np.linalg.eigh(np.cov(kernel.T))
    filters, shares = patch_filters(model)
    assert filters.shape == (23, 3, 4, 4)  # 24 filters, centred, have rank 23
    for index in range(23):
        flat = filters[index].ravel()
        assert abs(flat @ vectors[:, -1 - index]) == pytest.approx(1.0, abs=1e-6)
        assert flat[np.abs(flat).argmax()] > 0.0
    np.testing.assert_allclose(shares, values[::-1][:23] / values.sum(), atol=1e-9)


def test_filters_mixed_from_known_patterns_give_these_patterns() -> None:
    """The patterns are a horizontal and a vertical cosine and a colour, with standard deviations of 3, 2 and 1."""
    model = recording_model(ModelConfig.model_validate({**SMALL.model_dump(), "width": 192, "num_heads": 3}))
    wave = np.cos(np.pi * (np.arange(4) + 0.5) / 4)
    patterns = np.zeros((3, 3, 4, 4))
    patterns[0], patterns[1] = wave[None, None, :], wave[None, :, None]
    patterns[2, 0], patterns[2, 2] = 1.0, -1.0
    patterns /= np.sqrt((patterns**2).sum(axis=(1, 2, 3), keepdims=True))
    amounts = np.linalg.qr(np.random.default_rng(0).standard_normal((192, 4)) * [0, 1, 1, 1] + [1, 0, 0, 0])[0][:, 1:]
    kernel = 0.7 + np.einsum("nk,kcyx->ncyx", amounts * [3, 2, 1], patterns)
    model.patch_embed.proj.weight.set_value(kernel.astype(np.float32))
    filters, shares = patch_filters(model, max_filters=3)
    np.testing.assert_allclose(shares, np.array([9, 4, 1]) / 14, atol=1e-6)
    for pattern, component in zip(patterns, filters, strict=True):
        assert abs((pattern * component).sum()) == pytest.approx(1.0, abs=1e-6)


@kinds
def test_an_export_has_the_models_weights(kind: str, tmp_path: Path) -> None:
    """Paddle numbers the parameters of later models of a process differently, which must not matter."""
    config = Config.model_validate({"name": "small", "model": config_of(kind).model_dump()})
    model = recording_model(config.model)
    write_artifact(without_recorder(model, config.model), config, spec_of(config, list("abcde")), tmp_path)
    loaded, spec = load_exported(tmp_path)
    assert spec.model == config.model
    state, loaded_state = file_state(model), file_state(loaded)
    assert state.keys() == loaded_state.keys()
    assert all(np.array_equal(state[name], loaded_state[name]) for name in state)
    images = images_and_labels(2)[0].numpy()
    assert np.array_equal(attention_map(model, images), attention_map(loaded, images))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": 3}, "has no parameter blocks.2"),
        ({"num_heads": 2}, "computes another model than vit_static.json describes"),
    ],
)
def test_an_export_with_the_spec_of_another_model_is_refused(
    tmp_path: Path, changed: dict[str, int], message: str
) -> None:
    config = Config.model_validate({"name": "small", "model": SMALL.model_dump()})
    model = without_recorder(recording_model(config.model), config.model)
    write_artifact(model, config, spec_of(config, list("abcde")), tmp_path)
    spec = json.loads((tmp_path / SPEC_FILE).read_text())
    spec["model"].update(changed)
    (tmp_path / SPEC_FILE).write_text(json.dumps(spec))
    with pytest.raises(PredictError, match=message):
        load_exported(tmp_path)


def test_denormalized_pixels_are_the_crop_of_the_image() -> None:
    """A crop_pct of 0.5 takes the middle of an image of twice the size, without resizing; each channel has its mean."""
    config = load_config(
        None,
        ["model.image_size=64", "eval.crop_pct=0.5", "data.mean=[0.4,0.5,0.6]", "data.std=[0.2,0.3,0.1]"],
    )
    preprocessing = spec_of(config, [str(label) for label in range(1000)]).preprocessing
    pixels = np.asarray(photo(128, 160))
    denormalized = denormalize(Preprocessor(preprocessing, 1)([pixels])[0], preprocessing)
    assert np.array_equal(denormalized, pixels[32:96, 48:112])


def test_the_colormap_gets_lighter_from_0_to_1() -> None:
    luma = drawing.apply_colormap(np.linspace(0.0, 1.0, 101)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(luma) > 0).all() and luma[0] < 20 and luma[-1] > 230
    clipped, ends = (drawing.apply_colormap(np.array(values)) for values in ([-3.0, 7.0], [0.0, 1.0]))
    assert np.array_equal(clipped, ends)


def test_the_heatmap_is_lightest_at_its_patch() -> None:
    picture = np.zeros((40, 60, 3), np.uint8)
    values = np.zeros((2, 3))
    values[1, 2] = 1.0
    for drawn in (drawing.overlay_heatmap(picture, values), drawing.darken(picture + 255, values)):
        assert drawn.shape == picture.shape
        means = drawn.mean(axis=2).reshape(2, 20, 3, 20).mean(axis=(1, 3))
        assert np.unravel_index(means.argmax(), means.shape) == (1, 2)
        assert means[1, 2] > 2.0 * means[0, 0]


def test_each_similarity_map_is_lightest_at_its_patch() -> None:
    picture = draw_similarity(position_similarity(recording_model(SMALL)))
    (lightest,) = drawing.apply_colormap(np.array([1.0]))
    is_lightest = (picture == lightest).all(axis=2)
    # 4 x 3 maps of 4 x 3 patches, 50 pixels per patch, 10 pixels between maps; the first begins at x = 12, y = 52
    for row in range(3):
        for column in range(4):
            top, left = 52 + row * 160 + row * 50, 12 + column * 210 + column * 50
            assert is_lightest[top : top + 50, left : left + 50].all()
    assert is_lightest[:, : 12 + 4 * 210].sum() == 12 * 50 * 50


def test_stems_are_unique() -> None:
    paths = [Path(name) for name in ("a/cat.png", "b/cat.jpeg", "cat_2.png", "c/cat.png", "dog.x.png")]
    assert unique_stems(paths) == ["cat", "cat_2", "cat_2_2", "cat_3", "dog.x"]


TINY = (
    tiny_model(depth=2)
    + """
data: {global_batch_size: 16, num_threads: 1}
train: {max_steps: 8}
"""
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Path:
    """Return a folder with a trained model, its export and images.

    One image is bad, two have the same name; of these, one is transparent and the other is a photo to be turned.
    """
    folder = tmp_path_factory.mktemp("a folder with spaces")
    (folder / "tiny.yaml").write_text(TINY)
    trained = run_verb("pretrain", "-c", "tiny.yaml", "-o", f"data.root={small_digits}", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    exported = run_verb("export", "--checkpoint", "output/tiny", "--weights", "last", "--out", "exported", cwd=folder)
    assert exported.returncode == 0, exported.stderr
    for name, digit in (("one.png", 1), ("more/one.jpeg", 7), ("two words.jpeg", 2)):
        (folder / name).parent.mkdir(exist_ok=True)
        image = Image.open(next((small_digits / "val" / str(digit)).iterdir())).resize((90, 70))
        if name == "one.png":
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6 if name == "more/one.jpeg" else 1
        image.save(folder / name, exif=exif)
    (folder / "bad.jpeg").write_bytes(b"no image")
    (folder / "bare").mkdir()
    write_pdparams(read_weights(folder / "output/tiny/model.pdparams").state, folder / "bare/weights.pdparams")
    return folder


IMAGES = ("one.png", "bad.jpeg", "more", "two words.jpeg")
PICTURES = [
    "position_similarity.png",
    "patch_filters.png",
    *(f"{stem}_{kind}.png" for stem in ("one", "one_2", "two words") for kind in ("rollout", "heads")),
]


def test_a_run_and_its_export_give_the_same_pictures(workplace: Path) -> None:
    results = {}
    for source, arguments in {"run": ["--checkpoint", "output/tiny"], "export": ["--model", "exported"]}.items():
        finished = run_verb("visualize", *arguments, *IMAGES, "--out", f"out/{source}", cwd=workplace)
        assert finished.returncode == 2 and finished.stderr.count("\n") == 1 and "1 image " in finished.stderr
        lines = finished.stdout.splitlines()
        assert [line for line in lines if line[0] != "{"] == [f"out/{source}/{name}" for name in PICTURES]
        assert sorted(path.name for path in (workplace / "out" / source).iterdir()) == sorted(PICTURES)
        results[source] = [json.loads(line) for line in lines if line[0] == "{"]
    for name in PICTURES:
        path, other = (workplace / "out" / source / name for source in results)
        assert path.read_bytes() == other.read_bytes()
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 100
    assert results["run"] == results["export"]
    assert [result["path"] for result in results["run"]] == ["one.png", "bad.jpeg", "more/one.jpeg", "two words.jpeg"]
    assert "bad.jpeg" in results["run"][1]["error"]


def test_its_predictions_are_those_of_predict(workplace: Path) -> None:
    finished = run_verb("visualize", "--model", "exported", "one.png", "more", "two words.jpeg", cwd=workplace)
    assert finished.returncode == 0 and finished.stderr == ""
    assert (workplace / "visualize" / "one_rollout.png").is_file()
    results = [json.loads(line) for line in finished.stdout.splitlines() if line[0] == "{"]
    arguments = ["predict", "--model", "exported", "--top-k", "1", "one.png", "more", "two words.jpeg"]
    predicted = run_verb(*arguments, cwd=workplace)
    for result, line in zip(results, predicted.stdout.splitlines(), strict=True):
        expected = json.loads(line)
        assert result["path"] == expected["path"] and result["top"][0]["name"] == expected["top"][0]["name"]
        assert result["top"][0]["probability"] == pytest.approx(expected["top"][0]["probability"], abs=1e-5)


def test_a_file_of_weights_works_with_a_config(workplace: Path) -> None:
    arguments = ["--checkpoint", "bare/weights.pdparams", "-c", "tiny.yaml", "--out", "out/bare"]
    finished = run_verb("visualize", *arguments, "one.png", cwd=workplace)
    assert finished.returncode == 0, finished.stderr
    assert (workplace / "out/bare/position_similarity.png").is_file()
    name = json.loads(finished.stdout.splitlines()[-1])["top"][0]["name"]
    assert name.isdigit()  # the label, because there are no class names beside the file


def test_a_model_without_position_embedding_has_no_picture_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config.model_validate({"name": "small", "model": config_of(KIND_WITHOUT_POSITIONS).model_dump()})
    model = without_recorder(recording_model(config.model), config.model)
    assert model.pos_embed is None
    write_artifact(model, config, spec_of(config, list("abcde")), tmp_path / "exported")
    photo(40, 30).save(tmp_path / "one.png")
    out = tmp_path / "out"
    assert visualize(None, tmp_path / "exported", None, [tmp_path / "one.png"], out, []) == 0
    assert sorted(path.name for path in out.iterdir()) == ["one_heads.png", "one_rollout.png", "patch_filters.png"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vit_static: ")]
    assert "no position_similarity.png" in line and "model.pos_embed=none" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.png"], "--model --checkpoint is required"),
        (["--model", "exported", "--checkpoint", "output/tiny", "one.png"], "not allowed with"),
        (["--model", "exported", "-o", "seed=1", "one.png"], "need --checkpoint"),
        (["--model", "output/tiny", "one.png"], "is a run, not an exported model; export it first"),
        (["--checkpoint", "nowhere", "one.png"], "nowhere: no such file or folder"),
        (["--checkpoint", "bare/weights.pdparams", "one.png"], "with -c"),
        (["--model", "exported", "one.png", "--out", "tiny.yaml"], "--out takes a folder"),
    ],
)
def test_mistakes_say_what_to_do(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(workplace)
    with pytest.raises(UserError, match=message) as error:
        parsed = make_parser().parse_args(["visualize", *arguments])
        visualize(None, parsed.model, parsed.checkpoint, parsed.images, parsed.out, parsed.overrides)
    assert "\n" not in str(error.value)


def test_a_missing_image_is_reported_before_anything_is_drawn(workplace: Path) -> None:
    finished = run_verb("visualize", "--model", "exported", "missing.png", "--out", "out/none", cwd=workplace)
    assert finished.returncode == 2 and finished.stdout == "" and not (workplace / "out/none").exists()
    assert finished.stderr == "vit_static: missing.png: no such file or folder\n"

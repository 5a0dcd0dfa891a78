"""Weights into models: Paddle's format, finetuning from other shapes, and other models refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers.numpy_vit import logits as numpy_logits
from helpers.small import SMALL, images_and_labels, model_logits, random_state, read_state, set_weights

from vit_static.common.errors import WeightsError
from vit_static.config.schema import InitConfig
from vit_static.model.pos_embed import resample_pos_embed
from vit_static.model.vit import VisionTransformer
from vit_static.weights.formats import ExternalWeights
from vit_static.weights.load import LoadReport, file_state, init_from, load_into, write_pdparams
from vit_static.weights.loaded import Weights


def test_written_weights_are_read_by_paddle_and_by_us(tmp_path: Path) -> None:
    state = random_state()
    write_pdparams(state, tmp_path / "model.pdparams")
    loaded = paddle.load(str(tmp_path / "model.pdparams"))
    read = read_state(tmp_path / "model.pdparams")
    assert set(loaded) == set(read) == set(state)
    assert all(np.array_equal(loaded[name].numpy(), state[name]) for name in state)
    assert all(np.array_equal(read[name], state[name]) for name in state)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pdparams"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_file_in_plscs_layout_gives_its_logits(tmp_path: Path, dtype: str) -> None:
    """Saved by Paddle as PLSC does, also in half precision; the expected logits are computed by NumPy."""
    state = {name: value.astype(dtype) for name, value in random_state().items()}
    paddle.save({name: paddle.to_tensor(value) for name, value in state.items()}, str(tmp_path / "plsc.pdparams"))
    model = VisionTransformer(SMALL)
    set_weights(model, read_state(tmp_path / "plsc.pdparams"))
    model.eval()
    images, _ = images_and_labels(2)
    expected = numpy_logits(state, images.numpy(), patch_size=4, num_heads=3)
    np.testing.assert_allclose(model(images).numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"depth": 3}, "blocks.2"), ({"depth": 1}, "blocks.1"), ({"width": 36}, "36"), ({"num_classes": 7}, "head")],
    ids=["deeper", "shallower", "wider", "more classes"],
)
def test_another_models_weights_are_refused(changed, named) -> None:
    with pytest.raises(WeightsError, match="another model") as error:
        set_weights(VisionTransformer(SMALL), random_state(**changed), source="other.pdparams")
    assert named in str(error.value) and "other.pdparams" in str(error.value)


def initialized(
    state: dict[str, np.ndarray], init: InitConfig, **changed: object
) -> tuple[VisionTransformer, LoadReport]:
    """Return a small model that was initialised from a state, and the report."""
    config = SMALL.model_copy(update=changed)
    model = VisionTransformer(config)
    return model, init_from(model, config, ExternalWeights(dict(state), "test"), "run", init, source_grid=(3, 4))


def test_finetuning_starts_from_the_backbone_with_a_new_head() -> None:
    state = random_state()
    target, report = initialized(state, InitConfig(), num_classes=2, representation_size=None)
    after = file_state(target)
    assert report.reinitialized == ["head.weight", "head.bias"] and not report.resampled
    assert set(report.dropped) == {"head.weight", "head.bias", "head0.weight", "head0.bias"}
    assert not after["head.weight"].any()
    backbone = [name for name in after if not name.startswith("head")]
    assert all(np.array_equal(after[name], state[name]) for name in backbone)
    assert sorted(report.used) == sorted(backbone)


def test_finetuning_at_another_size_resamples_the_position_embedding() -> None:
    state = random_state()
    target, report = initialized(state, InitConfig(head="keep", pos_embed="antialias"), image_size=(20, 24))
    assert report.resampled == ["pos_embed"] and not report.reinitialized
    expected = resample_pos_embed(state["pos_embed"], (3, 4), (5, 6), "antialias")
    assert np.array_equal(file_state(target)["pos_embed"], expected)


def test_an_unknown_grid_is_an_error() -> None:
    config = SMALL.model_copy(update={"image_size": (20, 24)})
    state = random_state()
    state["pos_embed"] = state["pos_embed"][:, :12]  # 12 or 11 patches are no square
    with pytest.raises(WeightsError, match="pos_embed"):
        init_from(VisionTransformer(config), config, ExternalWeights(state, "test"), "run", InitConfig(head="keep"))


def test_a_kept_head_must_fit() -> None:
    with pytest.raises(WeightsError, match=r"head.*model\.num_classes=5"):
        initialized(random_state(), InitConfig(head="keep"), num_classes=2)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"depth": 3}, "depth=2"),
        ({"width": 36}, "width=24"),
        ({"qkv_bias": False}, "qkv_bias=true"),
        ({"register_tokens": 2}, "register_tokens=0"),
        ({"patch_size": 2}, "patch_size=4"),
        ({"mlp_dim": 32}, "mlp_dim=48"),
    ],
    ids=str,
)
def test_the_message_says_what_to_set_for_another_model(changed, named) -> None:
    with pytest.raises(WeightsError, match=f"-o model.{named}"):
        initialized(random_state(), InitConfig(), **changed)


def test_a_layer_scale_folded_into_plain_layers_gives_the_same_logits() -> None:
    state = random_state()
    scaled, _ = initialized(state, InitConfig(head="keep"))
    plain, report = initialized(state, InitConfig(head="keep"), layer_scale_init=None)
    assert set(report.folded) == {f"blocks.{block}.ls{branch}.gamma" for block in (0, 1) for branch in (1, 2)}
    images, _ = images_and_labels(3)
    expected = model_logits(scaled, images)
    np.testing.assert_allclose(model_logits(plain, images), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("pool", ["cls", "gap", "cls_gap"])
def test_the_class_tokens_position_is_folded_into_it_or_added(pool: str) -> None:
    """The logits with a position of 0 for the class token and those without one are the same, in both directions."""
    state = random_state(pool=pool, class_token=True)
    keep = InitConfig(head="keep")
    common = {"pool": pool, "class_token": True}
    original, _ = initialized(state, keep, **common)
    folded, report = initialized(state, keep, **common, class_token_pos_embed=False)
    assert report.folded == {"pos_embed of the class token": "cls_token"}
    assert file_state(folded)["pos_embed"].shape[1] == 12
    again, report = initialized(file_state(folded), keep, **common)
    assert report.notes and file_state(again)["pos_embed"].shape[1] == 13
    images, _ = images_and_labels(3)
    expected = model_logits(original, images)
    for other in (folded, again):
        np.testing.assert_allclose(model_logits(other, images), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_square_and_the_models_grid_of_as_many_patches_are_ambiguous() -> None:
    config = SMALL.model_copy(update={"image_size": (8, 32)})  # 2 x 8 patches, as many as 4 x 4
    external = ExternalWeights(random_state(image_size=(8, 32)), "test")
    with pytest.raises(WeightsError, match="4x4 patches or for the model's 2x8"):
        init_from(VisionTransformer(config), config, external, "x", InitConfig())
    init_from(VisionTransformer(config), config, external, "x", InitConfig(), (2, 8))


def test_load_into_keeps_the_head_and_resamples_the_position_embedding() -> None:
    config = SMALL.model_copy(update={"pool": "gap"})
    state = random_state(pool="gap", image_size=(16, 16))
    weights = Weights(ExternalWeights(state, "test"), config=None, class_names=None, source=Path("run"))
    model = VisionTransformer(config)
    report = load_into(model, config, weights, "bilinear")
    assert report.resampled == ["pos_embed"] and not report.reinitialized
    result, expected = file_state(model), resample_pos_embed(state["pos_embed"], (4, 4), (3, 4), "bilinear")
    assert np.array_equal(result["pos_embed"], expected)
    assert np.array_equal(result["head.weight"], state["head.weight"])

"""Weights in files: Paddle's own format both ways, nothing that could run code, other models refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers.numpy_vit import logits as numpy_logits
from helpers.small import SMALL, images_and_labels, model_logits, random_state, read_state

from vit_static.common.errors import WeightsError
from vit_static.config.schema import InitConfig
from vit_static.model.pos_embed import resample_pos_embed
from vit_static.model.vit import VisionTransformer
from vit_static.weights.formats import ExternalWeights
from vit_static.weights.load import file_state, init_from, load_state, write_pdparams


def test_what_is_written_paddle_loads_and_we_read_back(tmp_path: Path) -> None:
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
    """Saved by Paddle from layers, as PLSC saves, in half precision too; the logits are the equations'."""
    state = {name: value.astype(dtype) for name, value in random_state().items()}
    paddle.save({name: paddle.to_tensor(value) for name, value in state.items()}, str(tmp_path / "plsc.pdparams"))
    model = VisionTransformer(SMALL)
    load_state(model, read_state(tmp_path / "plsc.pdparams"), "plsc.pdparams")
    model.eval()
    images, _ = images_and_labels(2)
    expected = numpy_logits(state, images.numpy(), patch_size=4, num_heads=3)
    np.testing.assert_allclose(model(images).numpy(), expected, rtol=1e-4, atol=1e-6)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    marker, bad = tmp_path / "ran", tmp_path / "bad.pdparams"
    bad.write_bytes(pickle.dumps({"head.weight": Malicious(marker)}))
    with pytest.raises(WeightsError, match=r"posix\.system"):
        read_state(bad)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({}), pickle.dumps({"a": 1})],
    ids=["empty", "text", "list", "no keys", "no arrays"],
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.pdparams").write_bytes(content)
    with pytest.raises(WeightsError, match=r"odd\.pdparams") as error:
        read_state(tmp_path / "odd.pdparams")
    assert "\n" not in str(error.value)


def test_truncated_file(tmp_path: Path) -> None:
    write_pdparams(random_state(), tmp_path / "model.pdparams")
    whole = (tmp_path / "model.pdparams").read_bytes()
    (tmp_path / "model.pdparams").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="not a Paddle state dict"):
        read_state(tmp_path / "model.pdparams")


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"depth": 3}, "blocks.2"), ({"depth": 1}, "blocks.1"), ({"width": 36}, "36"), ({"num_classes": 7}, "head")],
    ids=["deeper", "shallower", "wider", "more classes"],
)
def test_another_models_weights_are_refused(changed, named) -> None:
    with pytest.raises(WeightsError, match="another model") as error:
        load_state(VisionTransformer(SMALL), random_state(**changed), "other.pdparams")
    assert named in str(error.value) and "other.pdparams" in str(error.value)


def started(state: dict[str, np.ndarray], init: InitConfig, **changed: object):
    """A fresh small model that starts from a state, and what became of that."""
    config = SMALL.model_copy(update=changed)
    model = VisionTransformer(config)
    return model, init_from(model, config, ExternalWeights(dict(state), "test"), "run", init, source_grid=(3, 4))


def test_finetuning_starts_from_the_body_with_a_fresh_head() -> None:
    state = random_state()
    target, report = started(state, InitConfig(), num_classes=2, representation_size=None)
    after = file_state(target)
    assert report.reinitialized == ["head.weight", "head.bias"] and not report.resampled
    assert set(report.dropped) == {"head.weight", "head.bias", "head0.weight", "head0.bias"}
    assert not after["head.weight"].any()
    body = [name for name in after if not name.startswith("head")]
    assert all(np.array_equal(after[name], state[name]) for name in body)
    assert sorted(report.used) == sorted(body)


def test_finetuning_at_another_size_resamples_the_position_embedding() -> None:
    state = random_state()
    target, report = started(state, InitConfig(head="keep", pos_embed="antialias"), image_size=(20, 24))
    assert report.resampled == ["pos_embed"] and not report.reinitialized
    expected = resample_pos_embed(state["pos_embed"], (3, 4), (5, 6), "antialias")
    assert np.array_equal(file_state(target)["pos_embed"], expected)


def test_a_grid_that_cannot_be_known_is_an_error_not_a_guess() -> None:
    config = SMALL.model_copy(update={"image_size": (20, 24)})
    state = random_state()
    state["pos_embed"] = state["pos_embed"][:, :12]  # 12 or 11 patches are no square
    with pytest.raises(WeightsError, match="pos_embed"):
        init_from(VisionTransformer(config), config, ExternalWeights(state, "test"), "run", InitConfig(head="keep"))


def test_a_kept_head_must_fit() -> None:
    with pytest.raises(WeightsError, match=r"head.*model\.num_classes=5"):
        started(random_state(), InitConfig(head="keep"), num_classes=2)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"depth": 3}, "depth=2"),
        ({"width": 36}, "width=24"),
        ({"qkv_bias": False}, "qkv_bias=True"),
        ({"register_tokens": 2}, "register_tokens=0"),
        ({"patch_size": 2}, "patch_size=4"),
        ({"mlp_dim": 32}, "mlp_dim=48"),
    ],
    ids=str,
)
def test_what_to_set_for_another_model_is_told(changed, named) -> None:
    with pytest.raises(WeightsError, match=f"-o model.{named}"):
        started(random_state(), InitConfig(), **changed)


def test_a_layer_scale_folded_into_plain_layers_gives_the_same_logits() -> None:
    state = random_state()
    scaled, _ = started(state, InitConfig(head="keep"))
    plain, report = started(state, InitConfig(head="keep"), layer_scale_init=None)
    assert set(report.folded) == {f"blocks.{block}.ls{branch}.gamma" for block in (0, 1) for branch in (1, 2)}
    images, _ = images_and_labels(3)
    expected = model_logits(scaled, images)
    np.testing.assert_allclose(model_logits(plain, images), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("pool", ["cls", "gap", "cls_gap"])
def test_a_class_tokens_position_is_folded_into_it_or_made(pool: str) -> None:
    """With a position of 0 beside the patches' and without one the logits are the same, both ways."""
    state = random_state(pool=pool, class_token=True)
    keep = InitConfig(head="keep")
    common = {"pool": pool, "class_token": True}
    given, _ = started(state, keep, **common)
    folded, report = started(state, keep, **common, class_token_pos_embed=False)
    assert report.folded == {"pos_embed of the class token": "cls_token"}
    assert file_state(folded)["pos_embed"].shape[1] == 12
    again, report = started(file_state(folded), keep, **common)
    assert report.notes and file_state(again)["pos_embed"].shape[1] == 13
    images, _ = images_and_labels(3)
    expected = model_logits(given, images)
    for other in (folded, again):
        np.testing.assert_allclose(model_logits(other, images), expected, rtol=0, atol=1e-5 * np.abs(expected).max())

"""Models from weights: recorded and inferred ones, backbones without a head, `model.from`, and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import paddle
import pytest
from helpers.small import SMALL, random_state
from helpers.weight_files import FILES, WEIGHTS, save_changed
from safetensors import safe_open

from vit_static.__main__ import main
from vit_static.common.errors import ConfigError, WeightsError
from vit_static.config.loader import load_config
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import InitConfig
from vit_static.model.vit import VisionTransformer
from vit_static.weights.convert import convert_state, write_converted
from vit_static.weights.formats import ExternalWeights, read_weights
from vit_static.weights.infer import config_for, differing_keys, infer_config
from vit_static.weights.load import init_from, write_pdparams
from vit_static.weights.source import load_weights, with_model_of_init

# Every model that a format has, of a shape and with options that no array determines.
_UNDETERMINED = {"layer_norm_epsilon": 1e-5, "gelu": "tanh", "drop_path_rate": 0.1, "representation_size": None}
RECORDED = {
    "timm": {"pool": "gap", "class_token": True, "fc_norm": True, "register_tokens": 2},
    "google": {"layer_scale_init": None},
    "huggingface": {"layer_scale_init": None},
}


@pytest.mark.parametrize("to", RECORDED)
def test_a_conversion_and_back_needs_no_flags_and_gives_the_same_bits(tmp_path: Path, to: str, capfd) -> None:
    """The model's 12 x 16 pixels, its 3 heads and its epsilon are only in the record."""
    model = SMALL.model_copy(update=_UNDETERMINED | RECORDED[to])
    state = random_state(**_UNDETERMINED, **RECORDED[to])
    original = tmp_path / "model.pdparams"
    write_pdparams(state, original, model)
    converted = tmp_path / to / ("model.npz" if to == "google" else "model.safetensors")
    assert main(["convert", "--from", str(original), "--to", str(converted), "--format", to]) == 0
    assert main(["convert", "--from", str(converted), "--to", str(tmp_path / "back.pdparams")]) == 0, capfd.readouterr()
    assert (tmp_path / "back.pdparams").read_bytes() == original.read_bytes()
    assert load_weights(converted).external.model == model


def test_other_programs_read_files_with_a_record(tmp_path: Path) -> None:
    """paddle.load stops at the pickle's end, and big_vision reads only what is below params/."""
    state = random_state()
    write_pdparams(state, tmp_path / "model.pdparams", SMALL)
    assert paddle.load(str(tmp_path / "model.pdparams")).keys() == state.keys()
    model = SMALL.model_copy(update={"layer_scale_init": None, "pool": "gap", "representation_size": None})
    plain = random_state(layer_scale_init=None, pool="gap", representation_size=None, class_token_pos_embed=False)
    write_converted(
        plain, model.model_copy(update={"class_token_pos_embed": False}), tmp_path / "vit_jax.npz", "google"
    )
    fixed = model.model_copy(update={"pos_embed": "sincos2d"})
    del plain["pos_embed"]
    write_converted(plain, fixed, tmp_path / "big_vision.npz", "google")
    names = np.load(tmp_path / "big_vision.npz").files
    assert {name for name in names if not name.startswith("params/")} == {"vit_static_model"}
    write_converted(plain | {"pos_embed": np.zeros((1, 12, 24), np.float32)}, model, tmp_path / "x.safetensors", "timm")
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt" and json.loads(file.metadata()["vit_static_model"])["num_heads"] == 3


def test_arrays_win_over_a_record_that_they_contradict(tmp_path: Path) -> None:
    """The record of a file whose head was removed by another program."""
    write_pdparams(random_state(), tmp_path / "x.pdparams", SMALL)
    external = read_weights(tmp_path / "x.pdparams")
    for name in [name for name in external.state if name.startswith("head")]:
        del external.state[name]
    config = infer_config(external, "x", []).model
    assert (config.num_classes, config.num_heads, config.image_size, config.depth) == (0, 3, (12, 16), 2)


@pytest.mark.parametrize("record", ["{", '{"width": -1}', '{"wings": 2}', "[" * 5000])
def test_a_damaged_record_is_named(tmp_path: Path, record: str) -> None:
    write_pdparams(random_state(), tmp_path / "x.pdparams")
    with (tmp_path / "x.pdparams").open("ab") as file:
        file.write(f"\nvit_static_model: {record}\n".encode())
    with pytest.raises(WeightsError, match=r"x\.pdparams: its record of the model"):
        read_weights(tmp_path / "x.pdparams")


def test_a_mismatch_lists_all_keys_at_once() -> None:
    state = random_state(pool="gap", fc_norm=True, depth=1, width=36, mlp_dim=72, num_classes=7, qkv_bias=False)
    external = ExternalWeights(state, "test", {"pool": "gap", "fc_norm": True, "num_heads": 6, "gelu": "tanh"})
    heads: list[tuple[Literal["keep", "reset"], dict[str, object]]] = [("keep", {"num_classes": 7}), ("reset", {})]
    for head, expected in heads:
        with pytest.raises(WeightsError) as error:
            init_from(VisionTransformer(SMALL), SMALL, external, "x", InitConfig(head=head), (3, 4))
        expected |= {"pool": "gap", "fc_norm": "true", "depth": 1, "width": 36, "mlp_dim": 72, "qkv_bias": "false"}
        expected |= {"num_heads": 6, "gelu": "tanh"}
        named = str(error.value).partition("(")[2].partition(")")[0].replace("-o model.", "")
        assert dict(item.split("=") for item in named.split()) == {key: str(value) for key, value in expected.items()}


def test_keys_that_can_be_adapted_are_not_listed() -> None:
    """A new head reads what it likes, and the position embedding and the class token are adapted."""
    external = ExternalWeights(random_state(), "test", {"pool": "cls", "fc_norm": False, "num_heads": 3})
    changed = {"pool": "gap", "fc_norm": True, "image_size": (20, 24), "num_classes": 9, "layer_scale_init": None}
    other = SMALL.model_copy(update=changed)
    assert differing_keys(external, other, with_head=False).keys() == {"class_token"}
    init_from(VisionTransformer(other), other, external, "x", InitConfig(), (3, 4))


def finetune(source: Path, tmp_path: Path, *overrides: str) -> ModelConfig:
    (tmp_path / "finetune.yaml").write_text("model: {variant: B/16, from: init, num_classes: 3, dropout: 0.1}\n")
    return with_model_of_init(load_config(tmp_path / "finetune.yaml", [f"init.from={source}", *overrides])).model


def test_the_models_shape_can_be_taken_from_the_weights(tmp_path: Path) -> None:
    """Of recorded files, of other programs' and of backbones; what the config sets wins."""
    write_pdparams(random_state(), tmp_path / "x.pdparams", SMALL.model_copy(update={"drop_path_rate": 0.5}))
    model = finetune(tmp_path / "x.pdparams", tmp_path)
    assert model.model_dump() == {
        **SMALL.model_dump(),
        **{"variant": "B/16", "num_classes": 3, "representation_size": None, "dropout": 0.1, "class_token": True},
    }
    assert finetune(tmp_path / "x.pdparams", tmp_path, "model.image_size=32").image_size == (32, 32)
    assert finetune(tmp_path / "x.pdparams", tmp_path, "init.head=keep").representation_size == 24
    deit3 = finetune(WEIGHTS / FILES["timm_deit3"], tmp_path, "model.num_heads=4")
    assert (deit3.width, deit3.depth, deit3.class_token_pos_embed, deit3.from_) == (20, 2, False, "config")
    for source, overrides, message in (
        (WEIGHTS / FILES["timm_deit3"], [], "model.num_heads too"),
        (WEIGHTS / FILES["timm_vit"], ["model.num_heads=4"], "model.image_size too"),
        (WEIGHTS / FILES["timm_gap_no_class"], ["model.num_heads=4", "model.image_size=[12,20]", "model.pool=cls"],
         "reads the class token"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            finetune(source, tmp_path, *overrides)
    with pytest.raises(ConfigError, match=r"set init\.from"):
        with_model_of_init(load_config(None, ["model.from=init"]))


# Backbones


@pytest.mark.parametrize("name", ["timm_vit", "timm_dinov2_reg", "hf_dinov2", "vit_jax"])
def test_a_backbone_without_a_head_converts_to_the_same_bits(tmp_path: Path, name: str) -> None:
    source = tmp_path / Path(FILES[name]).name
    to = {"timm": "timm", "hf": "huggingface", "vit": "google"}[name.split("_")[0]]
    if to == "google":
        arrays = {key: array for key, array in np.load(WEIGHTS / FILES[name]).items() if "head" not in key}
        np.savez(source, **{key: array for key, array in arrays.items() if "pre_logits" not in key})
    else:
        is_head = ("head.", "classifier.")
        save_changed(source, lambda all_: {k: v for k, v in all_.items() if not k.startswith(is_head)}, name)
    external = read_weights(source)
    config = infer_config(external, "backbone", ["model.num_heads=4"], (12, 20) if "vit" in name else None)
    assert config.model.num_classes == 0
    grid = (config.model.image_size[0] // 4, config.model.image_size[1] // 4)
    state, _ = convert_state(external, config.model, "backbone", InitConfig(head="keep"), grid)
    target = tmp_path / "back" / source.name
    write_converted(state, config.model, target, to)
    again = read_weights(target)
    assert again.state.keys() == external.state.keys() and again.model == config.model
    assert all(again.state[key].tobytes() == external.state[key].tobytes() for key in external.state)


def test_without_a_config_a_files_model_is_inferred(tmp_path: Path, capfd) -> None:
    write_pdparams(random_state(), tmp_path / "x.pdparams", SMALL)
    config = config_for(None, load_weights(tmp_path / "x.pdparams"), ["data.mean=[0,0,0]"])
    assert config.model == SMALL and config.data.mean == (0.0, 0.0, 0.0)
    assert "the model is inferred from the weights" in capfd.readouterr().err

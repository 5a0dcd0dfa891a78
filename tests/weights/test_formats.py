"""Other programs' weight files: our model gives their logits, and files written back have the same bits."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.small import REFERENCE, model_logits
from helpers.weight_files import (
    FILES,
    WEIGHTS,
    patch_grid,
    read_with_model,
    reference_logits,
    safetensors_entries,
    save_changed,
)
from safetensors.numpy import save_file

from vit_static.common.errors import WeightsError
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import InitConfig
from vit_static.model.pos_embed import resample_pos_embed
from vit_static.model.vit import VisionTransformer
from vit_static.weights.convert import convert_state, write_converted
from vit_static.weights.formats import ExternalWeights, read_weights
from vit_static.weights.load import init_from


def loaded_model(external: ExternalWeights, config: ModelConfig) -> VisionTransformer:
    model = VisionTransformer(config)
    report = init_from(model, config, external, "reference", InitConfig(head="keep"), patch_grid(config))
    assert not report.reinitialized and not report.resampled
    return model


@pytest.mark.parametrize("name", FILES)
def test_another_programs_weights_give_its_logits(name: str) -> None:
    images, expected = reference_logits(name)
    logits = model_logits(loaded_model(*read_with_model(name)), paddle.to_tensor(images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", FILES)
def test_a_round_trip_gives_the_same_bits(tmp_path: Path, name: str) -> None:
    """Every array in the file's own format; stacked blocks one by one, and half precision as float32."""
    external, config = read_with_model(name)
    original = WEIGHTS / FILES[name]
    to = {"plsc": "plsc", "paddleclas": "plsc", "timm": "timm", "hf": "huggingface"}.get(name.split("_")[0], "google")
    state = convert_state(external, config, "reference", InitConfig(head="keep"), patch_grid(config))[0]
    target = tmp_path / f"back{original.suffix}"
    write_converted(state, config, target, to)
    again = read_weights(target)
    assert again.state.keys() == external.state.keys()
    assert all(again.state[key].tobytes() == external.state[key].tobytes() for key in external.state)
    if to == "timm":
        assert safetensors_entries(target).keys() == safetensors_entries(original).keys()
    if to == "huggingface":
        theirs, ours = (json.loads((path.parent / "config.json").read_text()) for path in (original, target))
        shared = (theirs.keys() & ours.keys()) - {"id2label", "use_mask_token"}
        assert {"num_attention_heads", "patch_size", "layer_norm_eps", "architectures"} < shared
        assert {key: theirs[key] for key in shared} == {key: ours[key] for key in shared}


def test_written_files_have_the_other_programs_names_shapes_and_values(tmp_path: Path) -> None:
    names = ("timm_vit", "timm_dinov2_reg", "timm_deit_distilled", "hf_vit", "hf_dinov2", "hf_deit_distilled")
    for name in (*names, "vit_jax", "vit_jax_gap"):
        external, config = read_with_model(name)
        original, target = WEIGHTS / FILES[name], tmp_path / name / f"weights{Path(FILES[name]).suffix}"
        target.parent.mkdir()
        to = "google" if name.startswith("vit_jax") else "timm" if name.startswith("timm") else "huggingface"
        write_converted(external.state, config, target, to)
        if to == "google":
            theirs = {published_name(key): array for key, array in np.load(original).items()}
            ours = dict(np.load(target))
            assert theirs.keys() | {"vit_static_model"} == ours.keys()
            assert all(np.array_equal(theirs[key], ours[key]) for key in theirs)
        else:
            theirs, ours = safetensors_entries(original), safetensors_entries(target)
            assert theirs.keys() - {"dinov2.embeddings.mask_token"} == ours.keys()
            assert all(theirs[key]["shape"] == ours[key]["shape"] for key in ours)
            assert all(bytes(theirs[key]["data"]) == bytes(ours[key]["data"]) for key in ours)


def published_name(name: str) -> str:
    """Return the name in published checkpoints, from before Flax numbered a block's modules by class."""
    name = name.replace("Attention_0", "Attention_1").replace("MlpBlock_0", "MlpBlock_3")
    return re.sub(r"(encoderblock_\d+)/LayerNorm_1", r"\1/LayerNorm_2", name)


def test_layer_scale_can_be_folded_for_a_program_without_it(tmp_path: Path) -> None:
    external, config = read_with_model("timm_deit3")
    with pytest.raises(WeightsError, match="--fold-layer-scale"):
        write_converted(external.state, config, tmp_path / "vit.npz", "google")
    plain = config.model_copy(update={"layer_scale_init": None, "class_token_pos_embed": True, "gelu": "erf"})
    state, report = convert_state(external, plain, "deit3", InitConfig(head="keep"), (3, 3))
    assert len(report.folded) == 4
    write_converted(state, plain, tmp_path / "vit.npz", "google")
    images, expected = reference_logits("timm_deit3")
    logits = model_logits(loaded_model(read_weights(tmp_path / "vit.npz"), plain), paddle.to_tensor(images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["timm_deit_distilled", "hf_deit_distilled"])
def test_a_distilled_deit_has_two_heads(name: str) -> None:
    external, config = read_with_model(name)
    assert config.distillation_token and config.num_prefix_positions == 2
    model = loaded_model(external, config)
    model.eval()
    arrays = np.load(WEIGHTS / "deit.npz")
    with paddle.no_grad():
        heads = model.logits_of_heads(model.features(paddle.to_tensor(arrays[f"{name}/images"])))
    for logits, expected in zip(heads, arrays[f"{name}/heads"], strict=True):
        np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_positions_of_both_tokens_of_a_distilled_deit_can_be_folded() -> None:
    external, config = read_with_model("timm_deit_distilled")
    folded = config.model_copy(update={"class_token_pos_embed": False})
    images, expected = reference_logits("timm_deit_distilled")
    model = VisionTransformer(folded)
    init_from(model, folded, external, "reference", InitConfig(head="keep"), patch_grid(folded))
    np.testing.assert_allclose(model_logits(model, paddle.to_tensor(images)), expected, rtol=0, atol=1e-5)


def test_an_existing_config_json_is_not_overwritten(tmp_path: Path) -> None:
    external, config = read_with_model("hf_vit")
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(WeightsError, match="choose another folder"):
        write_converted(external.state, config, tmp_path / "model.safetensors", "huggingface")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_finetune_is_told_what_the_files_program_computes_differently() -> None:
    """vit_jax's GELU is Flax's approximation, and Hugging Face's ViT has another epsilon."""
    for name, expected in (("vit_jax", "model.gelu=tanh"), ("hf_vit", "model.layer_norm_epsilon=1e-12")):
        external, config = read_with_model(name)
        config = config.model_copy(update={"gelu": "erf", "layer_norm_epsilon": 1e-6})
        report = init_from(VisionTransformer(config), config, external, name, InitConfig(), patch_grid(config))
        assert any(expected in note for note in report.notes)


@pytest.mark.parametrize(
    ("mode", "grid"), [(mode, grid) for mode in ("bilinear", "antialias") for grid in ("4x7", "2x3", "6x10")]
)
def test_position_embeddings_are_resampled_as_vit_jax_and_timm_do(mode: Any, grid: str) -> None:
    arrays = np.load(REFERENCE / "pos_embed_modes.npz")
    rows, columns = map(int, grid.split("x"))
    result = resample_pos_embed(arrays["input"], (3, 5), (rows, columns), mode)
    np.testing.assert_allclose(result, arrays[f"{mode}/{grid}"], atol=2e-6)
    assert np.array_equal(result[:, 0], arrays["input"][:, 0])


# Other models


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        ("blocks.0.attn.gate.weight", "relative of EVA"),
        ("something.else", "which those files don't have"),
    ],
)
def test_other_models_are_refused_with_the_reason(tmp_path: Path, added: str, reason: str) -> None:
    path = save_changed(tmp_path / "odd.safetensors", lambda arrays: {**arrays, added: np.ones(3, np.float32)})
    with pytest.raises(WeightsError, match=reason) as error:
        read_weights(path)
    assert added in str(error.value)


@pytest.mark.parametrize(
    ("names", "architecture"),
    [
        (["layers.0.blocks.0.attn.relative_position_bias_table", "patch_embed.proj.weight"], "Swin"),
        (["swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table"], "Swin"),
        (["module.blocks.0.attn.relative_position_bias_table", "module.patch_embed.proj.weight"], "BEiT"),
        (["blocks.0.attn.q_proj.weight", "blocks.0.gamma_1", "patch_embed.proj.weight"], "EVA or BEiT"),
        (["storage_tokens", "cls_norm.weight", "patch_embed.proj.weight"], "DINOv3"),
        (["visual.attn_pool.query", "visual.conv1.weight"], "CoCa"),
        (["embeds.proj.weight"], "NaFlexVit"),
        (["layer1.0.conv1.weight"], "ResNet"),
    ],
)
def test_other_architectures_are_called_by_their_names(tmp_path: Path, names: list[str], architecture: str) -> None:
    """In every container, whatever the prefix."""
    arrays = {name: np.ones((2, 3), np.float32) for name in names}
    save_file(arrays, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **arrays)
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps({"state_dict": arrays}))
    for path in tmp_path.iterdir():
        with pytest.raises(WeightsError, match=f"is from .*{architecture}"):
            read_weights(path)


def test_residual_post_norm_is_refused_unless_the_architecture_is_another(tmp_path: Path) -> None:
    """The arrays of timm 1.0.31's vit_base_patch16_rpn_224 with one block, by their names."""
    layers = {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.fc1": (32, 8), "mlp.fc2": (8, 32)}
    arrays: dict[str, np.ndarray] = {
        f"blocks.0.{name}.weight": np.ones(shape, np.float32) for name, shape in layers.items()
    }
    arrays |= {f"blocks.0.{name}.bias": np.ones(shape[0], np.float32) for name, shape in layers.items()}
    norms = ("blocks.0.norm1", "blocks.0.norm2", "fc_norm")
    arrays |= {f"{name}.{part}": np.ones(8, np.float32) for name in norms for part in ("weight", "bias")}
    arrays |= {"pos_embed": np.ones((1, 4, 8), np.float32), "patch_embed.proj.bias": np.ones(8, np.float32)}
    arrays |= {"patch_embed.proj.weight": np.ones((8, 3, 16, 16), np.float32)}
    save_file(arrays, tmp_path / "with_biases.safetensors")
    del arrays["blocks.0.attn.qkv.bias"]
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    assert read_weights(tmp_path / "with_biases.safetensors").model_hints["fc_norm"]
    with pytest.raises(WeightsError, match=r"vit_\*_rpn_\* models, .* a config\.json beside the file: "):
        read_weights(path)
    config = tmp_path / "config.json"
    config.write_text('{"architecture": "vit_base_patch16_224"}')
    assert read_weights(path).model_hints["fc_norm"]
    config.write_text('{"architecture": "vit_base_patch16_rpn_224"}')
    for name in ("model", "with_biases"):
        with pytest.raises(WeightsError, match="norms come after attention and MLP"):
            read_weights(tmp_path / f"{name}.safetensors")


def test_paddleclas_small_vit_is_refused(tmp_path: Path) -> None:
    """It divides attention scores by the root of its width, not of a head's channels, which no array shows."""
    state = {"patch_embed.proj.weight": np.zeros((768, 3, 16, 16), np.float32)}
    for block in range(8):
        state[f"blocks.{block}.attn.qkv.weight"] = np.zeros((768, 3 * 768), np.float16)
        state[f"blocks.{block}.mlp.fc1.weight"] = np.zeros((768, 2304), np.float16)
    (tmp_path / "small.pdparams").write_bytes(pickle.dumps(state))
    with pytest.raises(WeightsError, match="ViT_small"):
        read_weights(tmp_path / "small.pdparams")


def test_arrays_of_pretraining_are_dropped(tmp_path: Path) -> None:
    decoder = {"mask_token": np.ones((1, 1, 20), np.float32), "decoder_embed.weight": np.ones((8, 20), np.float32)}
    path = save_changed(tmp_path / "mae.safetensors", lambda arrays: {**arrays, **decoder})
    assert read_weights(path).dropped.keys() == decoder.keys()


def test_arrays_of_integers_are_dropped(tmp_path: Path) -> None:
    counter = {"num_batches": np.array([3], np.int64)}
    path = save_changed(tmp_path / "x.safetensors", lambda arrays: arrays | counter)
    assert list(read_weights(path).dropped) == ["num_batches"]


@pytest.mark.parametrize("shape", [(1, 20), (1,)])
def test_a_layer_scale_that_does_not_fit_is_an_error(tmp_path: Path, shape: tuple[int, ...]) -> None:
    scale = {"blocks.0.ls1.gamma": np.ones(shape, np.float32)}
    external = read_weights(save_changed(tmp_path / "x.safetensors", lambda arrays: arrays | scale))
    config = read_with_model("timm_vit")[1]
    with pytest.raises(WeightsError, match=r"ls1\.gamma"):
        convert_state(external, config, "x", InitConfig(head="keep"), (3, 5))


def test_a_bias_that_does_not_fit_its_layer_scale_is_an_error(tmp_path: Path) -> None:
    bias = {"blocks.0.attn.proj.bias": np.ones(3, np.float32)}
    external = read_weights(save_changed(tmp_path / "x.safetensors", lambda arrays: arrays | bias, "timm_deit3"))
    config = read_with_model("timm_deit3")[1].model_copy(update={"layer_scale_init": None})
    with pytest.raises(WeightsError, match=r"ls1\.gamma"):
        convert_state(external, config, "x", InitConfig(head="keep"), (3, 3))


def test_a_layer_that_is_one_number_is_an_error(tmp_path: Path) -> None:
    number = {"blocks.0.mlp.fc1.weight": np.array(1.0, np.float32)}
    with pytest.raises(WeightsError, match=r"blocks\.0\.mlp\.fc1\.weight has the shape"):
        read_weights(save_changed(tmp_path / "x.safetensors", lambda arrays: arrays | number))


@pytest.mark.parametrize("added", ["fc_norm.weight", "backbone.head.weight"])
def test_two_arrays_for_one_parameter_are_an_error(tmp_path: Path, added: str) -> None:
    prefix = "backbone." if added.startswith("backbone") else ""
    more = {added: np.ones((7, 20) if prefix else 20, np.float32)}
    path = save_changed(
        tmp_path / "x.safetensors",
        lambda arrays: {(prefix + key if key != "head.weight" else key): array for key, array in arrays.items()} | more,
    )
    with pytest.raises(WeightsError):
        read_weights(path)


def test_key_and_value_biases_without_a_query_bias_are_an_error(tmp_path: Path) -> None:
    path = save_changed(
        tmp_path / "x.safetensors",
        lambda arrays: {key: array for key, array in arrays.items() if not key.endswith("query.bias")},
        "hf_vit",
    )
    with pytest.raises(WeightsError, match="don't belong together"):
        read_weights(path)


def test_another_activation_than_gelu_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((WEIGHTS / FILES["hf_vit"]).read_bytes())
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    with pytest.raises(WeightsError, match="hidden_act"):
        read_weights(tmp_path / "model.safetensors")


def test_a_model_that_the_target_does_not_have_is_refused(tmp_path: Path) -> None:
    for name, to, reason in (
        ("timm_avg_fc_norm", "google", "norm comes after"),
        ("big_vision_gap_sincos", "timm", "fixed"),
        ("timm_dinov2_reg", "google", "LayerScale"),
    ):
        external, config = read_with_model(name)
        with pytest.raises(WeightsError, match=reason):
            write_converted(external.state, config, tmp_path / "x", to)


def test_another_number_of_heads_is_an_error() -> None:
    """Google's arrays and Hugging Face's config.json determine it."""
    for name in ("vit_jax", "hf_vit"):
        external, config = read_with_model(name)
        other = config.model_copy(update={"num_heads": 2})
        with pytest.raises(WeightsError, match=r"-o model\.num_heads=4"):
            convert_state(external, other, name, InitConfig(head="keep"), patch_grid(config))

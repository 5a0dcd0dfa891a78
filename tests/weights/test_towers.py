"""CLIP's and SigLIP's image towers: our model computes what the other programs do, and writes their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.small import model_logits
from helpers.weight_files import (
    FILES,
    TOWERS,
    WEIGHTS,
    patch_grid,
    read_with_model,
    reference_logits,
    safetensors_entries,
    save_changed,
)
from safetensors.numpy import load_file, save_file

from vit_static.common.errors import WeightsError
from vit_static.config.loader import load_config
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import InitConfig
from vit_static.model.vit import VisionTransformer
from vit_static.weights.convert import convert_state, write_converted
from vit_static.weights.formats import ExternalWeights, read_weights
from vit_static.weights.infer import infer_config
from vit_static.weights.load import LoadReport, init_from, write_pdparams
from vit_static.weights.source import with_model_of_init

# The keys beside those of shapes that each file's model needs, all of which are inferred.
CLIP = {"pool": "cls", "pre_norm": True, "layer_norm_epsilon": 1e-5, "class_token_pos_embed": True}
SIGLIP = {"pool": "map", "gelu": "tanh", "pre_norm": False, "layer_norm_epsilon": 1e-6}
KEYS: dict[str, dict[str, Any]] = {
    "timm_siglip": {**SIGLIP, "gelu": "erf", "num_classes": 7},  # timm's GELU
    "timm_clip": {**CLIP, "gelu": "quick", "num_classes": 7},
    "openai_clip": {**CLIP, "gelu": "quick", "num_classes": 7},
    "open_clip": {**CLIP, "gelu": "erf", "num_classes": 7},
    "eva_clip": {"pool": "cls", "rope": "axial", "mlp": "swiglu", "attention_norm": True, "num_classes": 7},
    "hf_clip": {**CLIP, "gelu": "quick", "num_classes": 7},
    "hf_clip_vision": {**CLIP, "gelu": "erf", "num_classes": 0},
    "hf_clip_projection": {**CLIP, "gelu": "quick", "num_classes": 7},
    "hf_siglip": {**SIGLIP, "num_classes": 0},
    "hf_siglip_classifier": {**SIGLIP, "pool": "gap", "num_classes": 7},
    "hf_siglip2_naflex": {**SIGLIP, "num_classes": 0},
}


def load(external: ExternalWeights, config: ModelConfig, **init: Any) -> tuple[VisionTransformer, LoadReport]:
    model = VisionTransformer(config)
    return model, init_from(model, config, external, "tower", InitConfig(**init), patch_grid(config))


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_computes_what_its_program_does(name: str) -> None:
    external, config = read_with_model(name)
    assert {key: getattr(config, key) for key in KEYS[name]} == KEYS[name]
    images, expected = reference_logits(name)
    logits = model_logits(load(external, config, head="keep")[0], paddle.to_tensor(images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def written(name: str, to: Any, folder: Path) -> Path:
    external, config = read_with_model(name)
    state = convert_state(external, config, name, InitConfig(head="keep"), patch_grid(config))[0]
    path = folder / "model.safetensors"
    write_converted(state, config, path, to)
    return path


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *(("timm_siglip", "timm"), ("timm_clip", "timm"), ("openai_clip", "openclip"), ("open_clip", "timm")),
        ("eva_clip", "timm"),
        *((name, to) for name in ("hf_clip", "hf_clip_vision") for to in ("huggingface", "timm", "openclip")),
        *(("hf_siglip", to) for to in ("huggingface", "timm", "google", "plsc")),
        *(("hf_siglip_classifier", "huggingface"), ("hf_siglip2_naflex", "timm")),
    ],
)
def test_a_written_tower_has_the_same_bits_and_model(tmp_path: Path, name: str, to: Any) -> None:
    """The other programs load these files strictly: tests/reference/make_peer_weights_towers.py --check FOLDER."""
    external, config = read_with_model(name)
    path = written(name, to, tmp_path)
    again = read_weights(path)
    assert again.state.keys() == external.state.keys()
    assert all(again.state[key].tobytes() == external.state[key].tobytes() for key in external.state)
    assert infer_config(again, name, []).model == config
    assert again.assumptions.keys() <= {"num_classes"}  # this program recorded the rest


@pytest.mark.parametrize(
    ("name", "to", "of_tower"),
    [
        ("timm_siglip", "timm", ""),
        ("timm_clip", "timm", ""),
        ("open_clip", "openclip", "visual."),
        ("hf_clip", "huggingface", "vi"),
        ("hf_siglip", "huggingface", "vision_model."),
    ],
)
def test_a_written_tower_has_the_other_programs_arrays(tmp_path: Path, name: str, to: Any, of_tower: str) -> None:
    theirs, ours = safetensors_entries(WEIGHTS / TOWERS[name]), safetensors_entries(written(name, to, tmp_path))
    theirs = {key: entry for key, entry in theirs.items() if key.startswith(of_tower)}
    assert theirs.keys() == ours.keys()
    assert all(theirs[key]["shape"] == ours[key]["shape"] for key in ours)
    assert all(bytes(theirs[key]["data"]) == bytes(ours[key]["data"]) for key in ours)


@pytest.mark.parametrize("name", ["hf_clip", "hf_clip_vision"])
def test_a_written_tower_has_hugging_faces_config(tmp_path: Path, name: str) -> None:
    written(name, "huggingface", tmp_path)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path, WEIGHTS / name))
    theirs = {**theirs.get("vision_config", theirs), "projection_dim": 7}
    assert {key: value for key, value in ours.items() if key != "architectures" and theirs[key] != value} == {}
    assert ours["architectures"] == [f"CLIPVisionModel{'WithProjection' if name == 'hf_clip' else ''}"]


# -- what is no part of the tower ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TOWERS, "big_vision_siglip"])
def test_every_array_is_used_or_dropped_with_its_reason(name: str) -> None:
    external, config = read_with_model(name)
    path = WEIGHTS / (FILES | TOWERS)[name]
    names = set(np.load(path)) if path.suffix == ".npz" else set(safetensors_entries(path))
    report = load(external, config, head="keep")[1]
    text = {
        each for each in names if each.removeprefix("params/").startswith(("text", "txt", "transformer", "ln_final"))
    }
    assert all(external.dropped[each] == "is not part of the image tower" for each in text)
    # Queries, keys and values are one array of ours, timm's kv is part of one, and CLIP's projection gets a bias.
    num_fused = sum(2 for each in names - text if each.endswith(("q_proj.weight", "q_proj.bias", "/query/kernel")))
    num_fused += sum(2 for each in names - text if each.endswith("/query/bias"))
    num_fused += sum(1 for each in names if each.startswith("attn_pool.kv."))
    num_fused -= sum(1 for each in names if each in ("visual.proj", "visual_projection.weight"))
    assert len(names) == len(report.used) + len(report.dropped) + num_fused
    if text:
        assert "(is not part of the image tower)" in report.describe()


def test_an_unknown_array_is_an_error(tmp_path: Path) -> None:
    for name, odd in (("hf_clip", "text_head.weight"), ("open_clip", "visual.odd"), ("timm_clip", "head_2.bias")):
        array = {odd: np.ones(3, "f4")}
        path = save_changed(tmp_path / f"{name}.safetensors", lambda arrays, array=array: arrays | array, name)
        with pytest.raises(WeightsError, match=odd.removeprefix("visual.")):
            read_weights(path)


@pytest.mark.parametrize("name", ["timm_siglip", "timm_eva02_clip"])
def test_towers_in_openclips_wrapper_of_timm_are_read(tmp_path: Path, name: str) -> None:
    """Their names are timm's below visual.trunk."""
    text = {"text.ln_final.weight": np.ones(3, "f4"), "logit_bias": np.ones((), "f4")}
    plain, arrays = read_weights(WEIGHTS / f"{name}.safetensors"), load_file(WEIGHTS / f"{name}.safetensors")
    save_file({f"visual.trunk.{key}": array for key, array in arrays.items()} | text, tmp_path / "x.safetensors")
    external = read_weights(tmp_path / "x.safetensors")
    assert external.dropped == plain.dropped | dict.fromkeys(text, "is not part of the image tower")
    assert external.state.keys() == plain.state.keys() and external.model_hints == plain.model_hints
    assert all(np.array_equal(external.state[key], plain.state[key]) for key in plain.state)


def test_naflex_files_of_big_vision_are_read(tmp_path: Path) -> None:
    """Their patch embedding is a linear layer, and their positions have two axes."""
    arrays = dict(np.load(WEIGHTS / FILES["big_vision_siglip"]))
    kernel, positions = "params/img/embedding/kernel", "params/img/pos_embedding"
    arrays |= {kernel: arrays[kernel].reshape(-1, 20), positions: arrays[positions].reshape(3, 5, 20)}
    np.savez(tmp_path / "naflex.npz", **arrays)
    state, expected = read_weights(tmp_path / "naflex.npz").state, read_with_model("big_vision_siglip")[0].state
    assert state.keys() == expected.keys() and all(np.array_equal(state[key], expected[key]) for key in state)
    np.savez(tmp_path / "odd.npz", **(arrays | {kernel: arrays[kernel][:30]}))
    with pytest.raises(WeightsError, match="no square RGB patch"):
        read_weights(tmp_path / "odd.npz")


def test_clips_classifier_of_hugging_face_is_dropped(tmp_path: Path) -> None:
    """It reads the mean of patches that haven't been normalized."""
    classifier = {"classifier.weight": np.ones((5, 20), "f4"), "classifier.bias": np.ones(5, "f4")}
    path = save_changed(tmp_path / "x.safetensors", lambda arrays: arrays | classifier, "hf_clip_vision")
    external = read_weights(path)
    assert external.dropped.keys() == classifier.keys() and "head.weight" not in external.state


# -- what no array tells ---------------------------------------------------------------------------------------------


def gelu_note(external: ExternalWeights, config: ModelConfig) -> str:
    notes = [note for note in load(external, config)[1].notes if note.startswith("model.gelu=")]
    assert len(notes) <= 1
    return "".join(notes)


@pytest.mark.parametrize(
    ("name", "gelu", "reason"),
    [
        ("openai_clip", "quick", "OpenAI's entry input_resolution"),
        ("open_clip", "erf", "OpenCLIP's default"),
        ("hf_clip", "quick", "without config.json"),
        ("timm_clip", "erf", "vit_*_clip_quickgelu_* have quick"),
        ("timm_siglip", "erf", "SigLIP was trained with tanh"),
    ],
)
def test_the_report_says_which_gelu_is_assumed(tmp_path: Path, name: str, gelu: str, reason: str) -> None:
    """Where no description of the model is next to the file."""
    path = tmp_path / "x.safetensors"
    path.write_bytes((WEIGHTS / TOWERS[name]).read_bytes())
    external = read_weights(path)
    image_size = (12, 20) if name in ("open_clip", "timm_clip", "timm_siglip") else None
    model = infer_config(external, name, ["model.num_heads=4"], image_size).model
    assert model.gelu == gelu
    note = gelu_note(external, model)
    assert note.startswith(f"model.gelu={gelu}: ") and reason in note


def test_a_description_next_to_the_file_determines_the_gelu() -> None:
    for name in ("hf_clip", "open_clip", "timm_clip", "hf_siglip"):
        assert gelu_note(*read_with_model(name)) == ""


@pytest.mark.parametrize(
    ("architecture", "gelu"),
    [
        ("vit_base_patch16_clip_224", "erf"),
        ("vit_large_patch14_clip_quickgelu_336", "quick"),
        ("vit_base_patch16_siglip_224", "erf"),
        ("vit_so400m_patch14_siglip_gap_224", "erf"),
        ("vit_so400m_patch16_siglip_gap_512", "tanh"),
        ("vit_giantopt_patch16_siglip_384", "tanh"),
        ("vit_large_patch16_siglip_384", "erf"),
        ("vit_large_patch16_siglip_512", "tanh"),
    ],
)
def test_timms_config_names_the_model_and_with_it_the_gelu(tmp_path: Path, architecture: str, gelu: str) -> None:
    """As in timm 1.0.31."""
    name = "timm_clip" if "clip" in architecture.split("_") else "timm_siglip"
    (tmp_path / "model.safetensors").write_bytes((WEIGHTS / TOWERS[name]).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
    assert read_weights(tmp_path / "model.safetensors").model_hints["gelu"] == gelu


def test_openclips_config_can_say_quick_gelu(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes((WEIGHTS / TOWERS["open_clip"]).read_bytes())
    config = json.loads((WEIGHTS / "open_clip" / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert read_weights(tmp_path / "x.safetensors").model_hints["gelu"] == "quick"
    for damaged in ("[]", '{"model_cfg": {"vision_cfg": 3}}', "{"):
        (tmp_path / "open_clip_config.json").write_text(damaged)
        assert read_weights(tmp_path / "x.safetensors").model_hints["gelu"] == "erf"


def test_openais_heads_have_64_channels(tmp_path: Path) -> None:
    def widened(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return arrays | {"visual.conv1.weight": np.ones((128, 3, 4, 4), "f4")}

    arrays = widened(load_file(WEIGHTS / TOWERS["openai_clip"]))
    save_file(arrays, tmp_path / "x.safetensors")
    assert read_weights(tmp_path / "x.safetensors").model_hints["num_heads"] == 2


def test_hugging_faces_defaults_are_those_of_the_model(tmp_path: Path) -> None:
    """Published files of SigLIP leave out of config.json what has its default."""
    (tmp_path / "x.safetensors").write_bytes((WEIGHTS / TOWERS["hf_siglip"]).read_bytes())
    (tmp_path / "config.json").write_text('{"vision_config": {"model_type": "siglip_vision_model"}}')
    hints = read_weights(tmp_path / "x.safetensors").model_hints
    assert (hints["num_heads"], hints["gelu"], hints["layer_norm_epsilon"]) == (12, "tanh", 1e-6)


# -- the model of a config -------------------------------------------------------------------------------------------


def test_a_finetune_takes_the_towers_model(tmp_path: Path) -> None:
    source = WEIGHTS / TOWERS["hf_siglip"]
    config = load_config(None, ["model.from=init", "model.num_classes=5", f"init.from={source}"])
    model = with_model_of_init(config).model
    assert (model.pool, model.gelu, model.num_classes, model.num_heads) == ("map", "tanh", 5, 4)
    network, report = load(read_weights(source), model)
    assert report.reinitialized == ["head.weight", "head.bias"]
    assert not network.head.weight.numpy().any()


def test_a_config_that_contradicts_the_file_is_told_the_keys_to_set() -> None:
    external, config = read_with_model("hf_siglip")
    with pytest.raises(WeightsError, match=r"-o model\.pool=map"):
        load(external, config.model_copy(update={"pool": "cls", "class_token": None}))
    external, config = read_with_model("hf_clip")
    with pytest.raises(WeightsError, match=r"-o model\.pre_norm=true"):
        load(external, config.model_copy(update={"pre_norm": False}))
    notes = load(external, config.model_copy(update={"gelu": "erf", "layer_norm_epsilon": 1e-6}))[1].notes
    assert "the file's program has model.gelu=quick, and this model erf" in notes
    assert "the file's program has model.layer_norm_epsilon=1e-05, and this model 1e-06" in notes


def test_a_new_head_can_pool_in_another_way() -> None:
    external, config = read_with_model("hf_siglip")
    report = load(external, config.model_copy(update={"pool": "gap"}))[1]
    assert len(report.dropped) == 24 + 11 and report.dropped["attn_pool.latent"] == "model.pool = gap"
    external, config = read_with_model("timm_gap_no_class")
    report = load(external, config.model_copy(update={"pool": "map"}))[1]
    assert "attn_pool.latent" in report.reinitialized and "head.weight" in report.reinitialized


def test_a_pdparams_without_a_record_can_pool_by_attention(tmp_path: Path) -> None:
    external, config = read_with_model("timm_siglip")
    write_pdparams(external.state, tmp_path / "x.pdparams")
    again = infer_config(read_weights(tmp_path / "x.pdparams"), "x", ["model.num_heads=4"], (12, 20)).model
    assert (again.pool, again.has_class_token) == ("map", False) and again.num_classes == config.num_classes


# -- models that the other programs don't have -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to", "reason"),
    [
        ("timm_clip", "huggingface", "projection has no bias.*--head drop"),
        ("timm_siglip", "huggingface", "no classifier behind its attention pooling.*--head drop"),
        ("open_clip", "huggingface", "square images"),
        ("hf_clip", "google", r"model\.pre_norm = True"),
        ("hf_siglip", "openclip", r"model\.pool = map"),
        ("hf_siglip_classifier", "openclip", "norm before its blocks"),
    ],
)
def test_what_the_target_does_not_have_is_refused(tmp_path: Path, name: str, to: Any, reason: str) -> None:
    with pytest.raises(WeightsError, match=reason):
        written(name, to, tmp_path)
    assert not list(tmp_path.iterdir())


def test_attention_pooling_without_the_prefix_tokens_is_refused(tmp_path: Path) -> None:
    """timm's reads the patches alone, and ours all tokens."""
    token = {"cls_token": np.ones((1, 1, 20), "f4")}
    path = save_changed(tmp_path / "x.safetensors", lambda arrays: arrays | token, "timm_siglip")
    with pytest.raises(WeightsError, match="reads only the patches"):
        read_weights(path)
    external, config = read_with_model("timm_siglip")
    with_class_token = config.model_copy(update={"class_token": True})
    with pytest.raises(WeightsError, match="reads only the patches"):
        write_converted(external.state, with_class_token, tmp_path / "y.safetensors", "timm")

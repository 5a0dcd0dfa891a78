"""The verb `convert`: reports, defaults, errors, and models inferred from arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers.small import SMALL, random_state
from helpers.weight_files import FILES, WEIGHTS

from vit_static.__main__ import main
from vit_static.model.pos_embed import resample_pos_embed
from vit_static.model.vit import VisionTransformer
from vit_static.weights.formats import ExternalWeights, read_weights
from vit_static.weights.infer import infer_config
from vit_static.weights.load import file_state

IMAGE_SIZE = ["--image-size", "12", "20"]


def test_convert_prints_and_saves_a_report_of_each_array(tmp_path: Path, capfd) -> None:
    source, target = WEIGHTS / FILES["hf_vit"], tmp_path / "out/vit.npz"
    assert main(["convert", "--from", str(source), "--to", str(target), "-o", "model.image_size=20"]) == 0
    output = capfd.readouterr().out
    assert "resampled: pos_embed" in output and "missing: none" in output and "-o model.num_heads=4" in output
    report = json.loads((tmp_path / "out/vit.npz.report.json").read_text())
    assert report["resampled"] == ["pos_embed"] and report["missing"] == report["unexpected"] == []
    assert read_weights(target).state["pos_embed"].shape == (1, 26, 20)


def test_convert_notes_what_the_target_computes_differently(tmp_path: Path, capfd) -> None:
    source = str(WEIGHTS / FILES["timm_deit3"])
    for target, expected in (("x.npz", "google computes with model.gelu=tanh"), ("x.safetensors", "")):
        arguments = ["--from", source, "--to", str(tmp_path / target), "-o", "model.num_heads=4"]
        assert main(["convert", *arguments, "--fold-layer-scale"]) == 0
        output = capfd.readouterr().out
        assert ("note: " in output) == bool(expected) and expected in output


def test_weights_converted_through_three_formats_are_the_same(tmp_path: Path, capfd) -> None:
    state = random_state(layer_scale_init=None, representation_size=None)
    paddle.save({name: paddle.to_tensor(value) for name, value in state.items()}, str(tmp_path / "mine.pdparams"))
    image_size = ["--image-size", "12", "16"]
    more = [*image_size, "-o", "model.num_heads=3"]
    for number, (source, target) in enumerate(
        [("mine.pdparams", "a.npz"), ("a.npz", "b.safetensors"), ("b.safetensors", "c.pdparams")]
    ):
        arguments = ["convert", "--from", str(tmp_path / source), "--to", str(tmp_path / target)]
        assert main([*arguments, *(image_size if number == 1 else more)]) == 0, capfd.readouterr().err
    again = read_weights(tmp_path / "c.pdparams").state
    assert again.keys() == state.keys() and all(np.array_equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--from", str(WEIGHTS / FILES["timm_vit"]), "--to", "x.npz"], "num_heads"),
        (["--from", str(WEIGHTS / FILES["timm_vit"]), "--to", "x.npz", "-o", "model.num_heads=4"], "--image-size"),
        (["--from", str(WEIGHTS / FILES["timm_deit3"]), "--to", "x.bin"], "--format"),
        (["--from", "nowhere.npz", "--to", "x.npz"], "nowhere.npz"),
        (["--from", str(WEIGHTS / FILES["timm_deit3"]), "--to", ".", "--format", "timm"], "is a folder"),
        (["--from", str(WEIGHTS / FILES["vit_jax_gap"]), "--to", "x.safetensors", "--format", "huggingface",
          *IMAGE_SIZE], "--format timm"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, monkeypatch, capfd, arguments: list[str], expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    error = capfd.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_model_is_inferred_from_its_arrays() -> None:
    config = SMALL.model_copy(update={"register_tokens": 3, "pool": "cls_gap", "class_token_pos_embed": False})
    external = ExternalWeights(file_state(VisionTransformer(config)), "ours", {"pool": "cls_gap"})
    inferred = infer_config(external, "x", ["model.num_heads=3"], (12, 16)).model
    keys = ("width", "depth", "mlp_dim", "patch_size", "num_classes", "representation_size", "register_tokens")
    assert all(
        getattr(inferred, key) == getattr(config, key) for key in (*keys, "class_token_pos_embed", "pool", "qkv_bias")
    )


def test_a_position_embedding_is_resampled_as_configured(tmp_path: Path) -> None:
    source = str(WEIGHTS / FILES["hf_vit"])
    for mode in ("bicubic", "bilinear", "antialias"):
        target = tmp_path / f"{mode}.npz"
        more = ["-o", "model.image_size=20", "-o", f"init.pos_embed={mode}"]
        assert main(["convert", "--from", source, "--to", str(target), *more]) == 0
        embedding, result = read_weights(Path(source)).state["pos_embed"], read_weights(target).state["pos_embed"]
        assert np.array_equal(result, resample_pos_embed(embedding, (3, 3), (5, 5), mode))

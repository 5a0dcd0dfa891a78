"""LoRA against peft: 20 steps of training, and adapters that peft has written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import numpy_vit
from helpers.small import REFERENCE, images_and_labels, model_logits
from safetensors.numpy import load_file, save_file

from vit_static.common.errors import WeightsError
from vit_static.config.lora_schema import LoraConfig
from vit_static.config.model_schema import ModelConfig
from vit_static.config.optim_schema import OptimConfig
from vit_static.config.schema import Config, InitConfig
from vit_static.model.lora import add_adapters, is_adapter
from vit_static.model.vit import VisionTransformer
from vit_static.weights.load import load_into
from vit_static.weights.lora import merge_lora
from vit_static.weights.source import load_weights

LORA = REFERENCE / "lora"
MODEL = ModelConfig(
    variant="Ti/16", image_size=(16, 16), patch_size=8, width=24, depth=2, num_heads=3, mlp_dim=40, num_classes=5,
    layer_norm_epsilon=1e-12,
)  # fmt: skip
ADAPTERS = LoraConfig(rank=4, alpha=6.0)


def test_twenty_steps_are_pefts(make_program, kernels) -> None:
    """Losses, gradient norms, adapters and head; then the merged weights give peft's logits."""
    golden = np.load(LORA / "training.npz")
    base = load_weights(LORA / "hf" / "model.safetensors")
    model = VisionTransformer(MODEL)
    load_into(model, MODEL, base, "bicubic")
    add_adapters(model, ADAPTERS)
    initial = {name.removeprefix("initial/"): golden[name] for name in golden if name.startswith("initial/")}
    trained = {name: value for name, value in model.named_parameters() if not value.stop_gradient}
    assert trained.keys() == initial.keys()
    for name, parameter in trained.items():
        parameter.set_value(initial[name])
    optim = OptimConfig(lr=5e-3, weight_decay=0.05, clip_norm=2.0)
    program = make_program(model, 8, optim, image_size=MODEL.image_size, kernels=kernels)
    for step in range(20):
        loss = program.loss_value(program.train_step(*images_and_labels(8, MODEL, seed=step), step))
        assert loss == pytest.approx(float(golden["losses"][step]), rel=1e-5)
        assert program.grad_norm() == pytest.approx(float(golden["grad_norms"][step]), rel=1e-4)
    assert golden["grad_norms"].min() < 2.0 < golden["grad_norms"].max()  # some are clipped
    weights = program.weights()
    final = {name: weights[name] for name in weights if is_adapter(name) or name.startswith("head.")}
    for name, value in final.items():
        np.testing.assert_allclose(value, golden[f"final/{name}"], rtol=1e-3, atol=2e-5, err_msg=name)
    config = Config(name="x", model=MODEL, lora=ADAPTERS, init=InitConfig.model_validate({"from": "hf"}))
    merged = merge_lora({name: golden[f"final/{name}"] for name in final}, base, config)
    logits = numpy_vit.logits(
        merged, images_and_labels(8, MODEL, seed=20)[0].numpy(), patch_size=8, num_heads=3, epsilon=1e-12
    )
    np.testing.assert_allclose(logits, golden["merged_logits"], rtol=1e-5, atol=1e-6)


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """Return a copy of the folder that peft has written, with the weights of timm's model."""
    return Path(shutil.copytree(LORA / "peft", tmp_path / "peft"))


def test_pefts_adapters_of_a_timm_model_are_merged(peft: Path) -> None:
    """With several ranks and alphas, and peft's own head."""
    model = MODEL.model_copy(update={"depth": 1, "mlp_dim": 48, "layer_norm_epsilon": 1e-6})
    loaded = load_weights(peft, overrides=[f"init.from={peft / 'base.safetensors'}"])
    assert loaded.has_adapters and loaded.external.dropped == {}
    built = VisionTransformer(model)
    load_into(built, model, loaded, "bicubic")
    logits = model_logits(built, images_and_labels(8, model, seed=0)[0])
    np.testing.assert_allclose(logits, np.load(peft / "logits.npz")["logits"], rtol=1e-5, atol=1e-5)


def change_settings(folder: Path, **changed: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def change_array(folder: Path, name: str, value: np.ndarray | None) -> None:
    path = folder / "adapter_model.safetensors"
    arrays = {**load_file(path), f"base_model.model.{name}": value}
    save_file({name: array for name, array in arrays.items() if array is not None}, path)


B_OF_PROJ = "blocks.0.attn.proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: change_settings(folder, use_dora=True), "use_dora is set"),
        (lambda folder: change_settings(folder, use_rslora=True), "use_rslora is set"),
        (lambda folder: change_settings(folder, peft_type="IA3"), "peft_type is 'IA3', and only LORA"),
        (lambda folder: change_settings(folder, lora_alpha="much"), r"adapter_config\.json: can't be read"),
        (lambda folder: change_settings(folder, alpha_pattern=[1]), r"adapter_config\.json: can't be read"),
        (lambda folder: change_array(folder, B_OF_PROJ, None), r"matrices of blocks\.0\.attn\.proj don't belong"),
        (lambda folder: change_array(folder, B_OF_PROJ, np.ones((24, 3), "f4")), "don't belong together"),
        (lambda folder: change_array(folder, B_OF_PROJ, np.ones((9, 4), "f4")), "are of another model"),
        (lambda folder: change_array(folder, "norm.weight", np.ones(24, "f4")), r"has norm\.weight, and only"),
    ],
)
def test_other_adapters_are_refused(peft: Path, change, message: str) -> None:
    change(peft)
    with pytest.raises(WeightsError, match=message):
        load_weights(peft, overrides=[f"init.from={peft / 'base.safetensors'}"])


def test_adapters_without_their_base_name_the_remedy(peft: Path) -> None:
    with pytest.raises(WeightsError, match=r"don't say where; name their place with -o init\.from=PATH"):
        load_weights(peft / "adapter_model.safetensors")
    change_settings(peft, base_model_name_or_path="timm/vit")
    with pytest.raises(WeightsError, match=r"are not at timm/vit; name their place with -o init\.from=PATH"):
        load_weights(peft / "adapter_model.safetensors")


def test_layers_that_are_newly_initialized_are_trained_without_an_adapter() -> None:
    model = VisionTransformer(MODEL.model_copy(update={"pool": "map"}))
    new = [name for name, _ in model.named_parameters() if name.startswith("attn_pool.")]
    add_adapters(model, LoraConfig(rank=2), new)
    names = {name for name, value in model.named_parameters() if not value.stop_gradient}
    assert set(new) <= names and not any(is_adapter(name) for name in names if name.startswith("attn_pool."))
    assert "blocks.0.attn.q.lora_a" in names and "norm.weight" not in names

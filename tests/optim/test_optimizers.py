"""Optimizers, against torch, timm and optax; parameter groups; the average of the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from helpers.small import REFERENCE, SMALL, images_and_labels
from paddle import nn
from reference.closed_form import uniform

from vit_static.config.optim_schema import OptimConfig, ScheduleConfig
from vit_static.model.attention import attention_by_matmul
from vit_static.model.vit import VisionTransformer
from vit_static.optim.ema import EMA, ema_decay
from vit_static.optim.optimizers import step_scalars
from vit_static.optim.param_groups import param_group
from vit_static.optim.schedule import learning_rate
from vit_static.optim.schedule_free import OFFSET

NUM_STEPS = 20


class GradientsFromInput(nn.Layer):
    """Layer whose output is the sum of parameters times inputs, so that its gradients are its input."""

    has_draws = False  # as of a VisionTransformer without random numbers of its own

    def __init__(self, initial: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.num_values = sum(value.size for value in initial.values())
        nested: dict[str, dict[str, np.ndarray]] = {}
        for name, value in initial.items():
            layer, _, inner_name = name.partition(".")
            if inner_name:
                nested.setdefault(layer, {})[inner_name] = value
            else:
                initializer = nn.initializer.Assign(value)
                self.add_parameter(name, self.create_parameter(value.shape, default_initializer=initializer))
        for name, values in nested.items():
            self.add_sublayer(name, GradientsFromInput(values))

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        values, total, start = images.flatten(), 0.0, 0
        for name, _ in self.named_parameters(include_sublayers=False):
            parameter = getattr(self, name)  # in a trace, the program's value
            count = int(np.prod(parameter.shape))
            total = total + (values[start : start + count].reshape(parameter.shape) * parameter).sum()
            start += count
        for layer in self.children():
            total = total + layer(values[start : start + layer.num_values])
            start += layer.num_values
        return total


class OutputAsLoss(nn.Layer):
    def forward(self, output: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
        return output


def train_on_gradients(
    make_program: Any, initial: dict[str, Any], gradients: dict[str, Any], optim: OptimConfig, **options: Any
):
    """Yield each step and the program after it. Gradients are [steps, *shape], by the name of the parameter."""
    side = 64 if sum(value.size for value in initial.values()) > 54 else 6
    program = make_program(
        GradientsFromInput(initial), 1, optim, criterion=OutputAsLoss(), image_size=(side // 2, side), **options
    )
    names = [name for name, _ in GradientsFromInput(initial).named_parameters()]
    for step in range(NUM_STEPS):
        images = np.zeros((1, 3, side // 2, side), np.float32)
        flat = np.concatenate([gradients[name][step].ravel() for name in names])
        images.ravel()[: len(flat)] = flat
        program.train_step(paddle.to_tensor(images), paddle.zeros([1], "int64"), step)
        yield step, program


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_twenty_updates_match_torch(make_program, kernels, name) -> None:
    """With clipping in half of the steps, decay on all parameters, and a different learning rate in each step."""
    golden = np.load(REFERENCE / "optimizers.npz")
    rates = golden["learning_rates"]
    keys = ("weight", "bias", "kernel")
    optim = OptimConfig(name=name, weight_decay={"adamw": 0.3, "sgd": 1e-4}[name], momentum=0.9, clip_norm=1.0)
    initial, gradients = ({key: golden[f"{kind}/{key}"] for key in keys} for kind in ("initial", "grad"))
    options = {"kernels": kernels, "learning_rate": lambda step: float(rates[step])}
    for step, program in train_on_gradients(make_program, initial, gradients, optim, **options):
        assert program.grad_norm() == pytest.approx(float(golden["grad_norms"][step]), rel=1e-5)
        for key, value in program.weights().items():
            np.testing.assert_allclose(
                value, golden[f"{name}/{key}"][step], rtol=2e-6, atol=2e-6, err_msg=f"{key} {step}"
            )


# With these names, the config gives the settings of the golden file: with a layer decay of 0.5, learning rates times
# 0.25, 0.5 and 1, and no weight decay for the bias.
NAMES = {"weight": "blocks.0.weight", "kernel": "blocks.1.kernel", "bias": "head.bias"}
SHAPES = {"weight": (34, 33), "kernel": (3, 2, 2), "bias": (5,)}
CASES: dict[str, dict[str, Any]] = {
    "lamb": {"name": "lamb", "epsilon": 1e-6, "weight_decay": 0.05, "no_decay": ("bias",)},
    "lion": {"name": "lion", "betas": (0.9, 0.99), "weight_decay": 0.1},
    "adafactor": {"name": "adafactor", "weight_decay": 0.03},
    "adamw_bigvision": {"name": "adamw", "weight_decay": 0.01, "decay_times_lr": False},
    "adamw_groups": {"name": "adamw", "weight_decay": 0.3, "no_decay": ("bias",), "layer_decay": 0.5},
    "ema_warmup": {"ema_decay": 0.99},
    "ema": {"ema_decay": 0.9, "ema_warmup": False},
}
for name in ("ema_warmup", "ema"):
    CASES[name] |= CASES["adamw_groups"]


@pytest.mark.parametrize("case", CASES)
def test_twenty_updates_match_the_recipes(make_program, case: str) -> None:
    """timm's LAMB and EMA, optax's Lion, big_vision's Adafactor and AdamW, torch's AdamW with parameter groups."""
    golden = np.load(REFERENCE / "optimizers_of_recipes.npz")
    rates, scales = golden["learning_rates"], golden["gradient_scales"]
    initial = {NAMES[key]: uniform(f"initial/{key}", shape) for key, shape in SHAPES.items()}
    gradients = {
        NAMES[key]: uniform(f"grad/{key}", (NUM_STEPS, *shape)) * scales.reshape(-1, *[1] * len(shape))
        for key, shape in SHAPES.items()
    }
    optim = OptimConfig(lr=float(rates[3]), clip_norm=1.0, **CASES[case])
    for step, program in train_on_gradients(
        make_program, initial, gradients, optim, learning_rate=lambda step: float(rates[step])
    ):
        assert program.grad_norm() == pytest.approx(float(golden["grad_norms"][step]), rel=1e-5)
        if optim.ema_decay:
            assert ema_decay(step, optim) == pytest.approx(float(golden[f"{case}/decays"][step]), abs=1e-7)
        if step % 5 == 4:
            values = program.weights(ema=optim.ema_decay > 0.0)
            for key, name in NAMES.items():
                expected = golden[f"{case}/{key}"][step // 5]
                np.testing.assert_allclose(values[name], expected, rtol=2e-6, atol=2e-6, err_msg=f"{key} {step}")


def test_twenty_updates_match_the_authors_schedule_free_adamw(make_program) -> None:
    """The sequence y, which is trained, and the average x, which is evaluated, also in a warmup of six steps."""
    golden = np.load(REFERENCE / "schedule_free.npz")
    initial = {NAMES[key]: uniform(f"initial/{key}", shape) for key, shape in SHAPES.items()}
    gradients = {
        NAMES[key]: uniform(f"grad/{key}", (NUM_STEPS, *shape))
        * golden["gradient_scales"].reshape(-1, *[1] * len(shape))
        for key, shape in SHAPES.items()
    }
    optim = OptimConfig(
        name="schedule_free_adamw",
        lr=0.05,
        betas=(0.9, 0.99),
        clip_norm=None,
        weight_decay=0.3,
        no_decay=("bias",),
        layer_decay=0.5,
    )
    schedule = ScheduleConfig(name="constant", warmup_steps=6)
    options = {"learning_rate": lambda step: learning_rate(step, NUM_STEPS, optim, schedule), "warmup_steps": 6}
    for step, program in train_on_gradients(make_program, initial, gradients, optim, **options):
        if step % 5 == 4:
            trained = {name: program.state()[name].numpy() for name in NAMES.values()}
            with program.schedule_free_weights():
                evaluated = {name: program.state()[name].numpy() for name in NAMES.values()}
            for key, name in NAMES.items():
                x, y = (golden[f"{kind}/{key}"][step // 5] for kind in "xy")
                np.testing.assert_allclose(trained[name], y, rtol=2e-6, atol=2e-6, err_msg=f"{key} {step}")
                np.testing.assert_allclose(evaluated[name], x, rtol=2e-6, atol=2e-6, err_msg=f"{key} {step}")
                assert np.array_equal(program.weights()[name], evaluated[name])
                assert np.array_equal(program.state()[name].numpy(), trained[name])


def test_the_average_of_schedule_free_weighs_by_the_squared_learning_rate() -> None:
    """The closed form against the authors' running sum, and without warmup the uniform mean."""
    optim, schedule = OptimConfig(name="schedule_free_adamw", lr=0.3), ScheduleConfig(name="constant", warmup_steps=7)
    squares = [learning_rate(step, 100, optim, schedule) ** 2 for step in range(20)]
    expected = np.array(squares) / np.cumsum(squares)
    weights = [step_scalars(step, optim, 7)["averaging_weight"] for step in range(20)]
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    uniform_weights = [step_scalars(step, optim)["averaging_weight"] for step in range(20)]
    np.testing.assert_allclose(uniform_weights, 1.0 / np.arange(1, 21), rtol=1e-12)


MUON_NAMES = {
    "wide": "blocks.0.mlp.fc1.weight",
    "tall": "blocks.1.mlp.fc2.weight",
    "kernel": "patch_embed.proj.weight",
    "head": "head.weight",
    "bias": "blocks.1.mlp.fc2.bias",
}
MUON_SHAPES = {"wide": (12, 20), "tall": (20, 9), "kernel": (10, 3, 2, 2), "head": (9, 5), "bias": (9,)}
MUON: dict[str, dict[str, Any]] = {
    "timm": {"epsilon": 1e-7},
    "author": {
        "epsilon": 1e-10,
        "nesterov": True,
        "newton_schulz": "original",
        "muon_scale": "original",
        "adamw_lr_scale": 0.015,
    },
}


@pytest.mark.parametrize("case", MUON)
def test_twenty_updates_match_timms_and_the_authors_muon(make_program, case: str) -> None:
    """Of wide and tall matrices and a kernel; by AdamW of the head and a bias."""
    golden = np.load(REFERENCE / "muon.npz")
    names = {key: name for key, name in MUON_NAMES.items() if f"{case}/{key}" in golden}
    initial = {name: uniform(f"initial/{key}", MUON_SHAPES[key]) for key, name in names.items()}
    gradients = {name: uniform(f"grad/{key}", (NUM_STEPS, *MUON_SHAPES[key])) for key, name in names.items()}
    for gradient in gradients.values():
        gradient[0] = 0.0
    shared = {"lr": 0.02, "momentum": 0.95, "betas": (0.9, 0.95), "weight_decay": 0.1, "no_decay": ("bias",)}
    optim = OptimConfig(name="muon", clip_norm=None, **shared, **MUON[case])
    for step, program in train_on_gradients(make_program, initial, gradients, optim):
        if step % 5 == 4:
            values = program.weights()
            for key, name in names.items():
                expected = golden[f"{case}/{key}"][step // 5]
                np.testing.assert_allclose(values[name], expected, rtol=5e-6, atol=5e-6, err_msg=f"{key} {step}")
    by_adamw = {name.split("@")[0] for name in program.state() if name.endswith("@moment2")}
    assert by_adamw == {MUON_NAMES["head"], MUON_NAMES["bias"]}


def test_exactly_the_kernels_of_layers_are_matrices_for_muon() -> None:
    config = SMALL.model_copy(update={"register_tokens": 2, "pool": "cls_gap"})
    model = VisionTransformer(config)
    groups = {name: param_group(name, 2, OptimConfig(), value.ndim) for name, value in model.named_parameters()}
    layers = [*(f"attn.{name}" for name in ("q", "k", "v", "proj")), "mlp.fc1", "mlp.fc2"]
    expected = {f"blocks.{block}.{layer}.weight" for block in range(2) for layer in layers}
    assert {name for name, group in groups.items() if group.is_matrix} == {
        *expected,
        "patch_embed.proj.weight",
        "head0.weight",
    }


def test_adafactor_factors_the_two_largest_axes(make_program) -> None:
    """A matrix with additional axes of size 1, like a position embedding, is updated like the matrix."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((33, 34)).astype(np.float32)
    gradients = rng.standard_normal((NUM_STEPS, 33, 34)).astype(np.float32)
    results = []
    for shape in ((33, 34), (1, 33, 34)):
        optim = OptimConfig(name="adafactor", lr=0.01, clip_norm=None)
        shaped = {"pos_embed": gradients.reshape(NUM_STEPS, *shape)}
        *_, (_, program) = train_on_gradients(make_program, {"pos_embed": matrix.reshape(shape)}, shaped, optim)
        state_shapes = {name: list(tensor.shape) for name, tensor in program.state().items()}
        assert state_shapes["pos_embed@row_moment2"] == list(shape[:-1])
        assert state_shapes["pos_embed@column_moment2"] == [*shape[:-2], shape[-1]]
        results.append(program.weights()["pos_embed"].reshape(33, 34))
    assert np.array_equal(*results)


def test_the_warmup_of_the_average_ends_at_its_decay() -> None:
    """timm's docstring: with power 2/3 a decay of 0.999 is reached after some 31,600 updates, 0.99 after 1,000."""
    optim = OptimConfig(ema_decay=0.99)
    assert ema_decay(998, optim) < 0.99 == ema_decay(1000, optim) == ema_decay(10**6, optim)
    assert ema_decay(31_622, OptimConfig(ema_decay=0.9999)) == pytest.approx(0.999, abs=1e-6)


def test_learning_rate_multiplier_and_decay_of_each_parameter() -> None:
    """The layer decay of BEiT and MAE, written out for a model with 12 blocks."""
    optim = OptimConfig(layer_decay=0.75, no_decay=("bias", "norm", "embedding"))
    expected = {
        "cls_token": (13, False),
        "pos_embed": (13, False),
        "reg_token": (13, False),
        "patch_embed.proj.weight": (13, True),
        "patch_embed.proj.bias": (13, False),
        "blocks.0.attn.q.weight": (12, True),
        "blocks.0.attn.q.bias": (12, False),
        "blocks.11.mlp.fc2.weight": (1, True),
        "blocks.11.norm1.weight": (1, False),
        "blocks.11.ls2.gamma": (1, False),
        "norm.weight": (0, False),
        "head.weight": (0, True),
        "head0.bias": (0, False),
    }
    for name, (num_layers_above, decays) in expected.items():
        group = param_group(name, 12, optim)
        assert group.lr_multiplier == pytest.approx(0.75**num_layers_above) and group.decays == decays, name
    assert all(param_group(name, 12, OptimConfig()).decays for name in expected)  # as in PLSC
    only_bias = OptimConfig(no_decay=("bias",))
    assert param_group("blocks.3.norm1.weight", 12, only_bias).decays
    assert not param_group("blocks.3.norm1.bias", 12, only_bias).decays


def test_exactly_the_matrices_decay() -> None:
    config = SMALL.model_copy(update={"register_tokens": 2, "pool": "cls_gap"})
    names = dict(VisionTransformer(config).named_parameters())
    optim = OptimConfig(no_decay=("bias", "norm", "embedding"))
    decaying = {name for name in names if param_group(name, 2, optim).decays}
    assert decaying == {
        name for name, value in names.items() if value.ndim > 1 and not name.endswith(("token", "embed"))
    }


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_with_a_frozen_backbone_only_the_head_learns(make_program, kernels, optimizer: str) -> None:
    """The head learns the same as a linear layer trained on the features of the backbone."""
    config = SMALL.model_copy(update={"representation_size": None})
    paddle.seed(3)
    model = VisionTransformer(config, attention_by_matmul)
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    model.eval()
    batches = [images_and_labels(8, config, seed=step) for step in range(5)]
    with paddle.no_grad():
        features = [model.features(images) for images, _ in batches]
    optim = OptimConfig(name=optimizer, lr=0.1, weight_decay=0.1, clip_norm=None)
    program = make_program(model, 8, optim, freeze="backbone", kernels=kernels)
    for step, (images, labels) in enumerate(batches):
        program.train_step(images, labels, step)
    after = program.weights()
    changed = {name for name in after if name in before and not np.array_equal(after[name], before[name])}
    assert changed == {"head.weight", "head.bias"}
    states = {name for name in program.state() if "@" in name}
    assert {name.split("@")[0] for name in states} == changed
    if optimizer == "adamw":
        head = nn.Linear(24, config.num_classes)
        head.set_state_dict({"weight": before["head.weight"], "bias": before["head.bias"]})
        alone = paddle.optimizer.AdamW(0.1, parameters=head.parameters(), weight_decay=0.1)
        for (_, labels), state in zip(batches, features, strict=True):
            nn.functional.cross_entropy(head(state), labels).backward()
            alone.step()
            alone.clear_grad()
        np.testing.assert_allclose(after["head.weight"], head.weight.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "adafactor", "schedule_free_adamw", "muon"])
def test_the_plan_counts_the_optimizer_state(make_program, name: str) -> None:
    """To the byte, and the EMA is one copy of the weights."""
    model = VisionTransformer(SMALL.model_copy(update={"width": 36, "depth": 1}), attention_by_matmul)
    has_ema = name != "schedule_free_adamw"
    program = make_program(model, 8, OptimConfig(name=name, ema_decay=0.9 if has_ema else 0.0))
    num_bytes = {key: 4 * int(np.prod(tensor.shape)) for key, tensor in program.state().items()}
    assert program.costs().optimizer_state == sum(size for key, size in num_bytes.items() if "@" in key)
    copies = f"@{EMA}" if has_ema else f"@{OFFSET}"
    assert program.costs().parameters == sum(size for key, size in num_bytes.items() if key.endswith(copies))

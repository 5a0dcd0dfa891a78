"""Make optimizers_of_recipes.npz: 20 steps of the optimizers of known ViT recipes, in float64.

With S the shape of `weight` [34, 33], `bias` [5], `kernel` [3, 2, 2], these inputs are computed, not stored:

- the initial parameters: closed_form.uniform(f"initial/{name}", S)
- step t's gradient: closed_form.uniform(f"grad/{name}", (20, *S))[t - 1] * gradient_scales[t - 1],
  exact in float32, as the scales are powers of two.

The gradients do not depend on the parameters. Each step's are clipped first, by clip_grad_norm_(1.0)
over the three together, so every optimizer sees the same ones (make_optimizers.py describes the
difference from Paddle's clip). With g the clipped gradient, lr step t's `learning_rates`, t from
1, p the parameter before the step, and all moments 0 at first:

- `lamb`: timm's Lamb without its own clipping. With m = 0.9 m + 0.1 g, v = 0.999 v + 0.001 g**2 and
  u = m / (1 - 0.9**t) / (sqrt(v / (1 - 0.999**t)) + 1e-6): `weight` and `kernel` have weight decay 0.05
  and a trust ratio, u += 0.05 * p, p -= lr * |p| / |u| * u with the 2-norms of the entire tensor (a ratio
  of 1 where either norm is 0); `bias` has neither, p -= lr * u. As in apex's FusedLAMB (use_nvlamb off),
  the ratio is applied only with the decay. timm's epsilon is 1e-6; facebookresearch/deit passes --opt-eps,
  1e-8 by default.
- `lion`: optax.lion. p -= lr * (sign(0.9 m + 0.1 g) + 0.1 * p), then m = 0.99 m + 0.01 g; the decay is on
  all three. No sign depends on rounding: |0.9 m + 0.1 g| is over 1e-4 (|0.9 m| + |0.1 g|).
- `adafactor`: scale_by_adafactor of google-research/big_vision's big_vision/optax.py (arXiv 2106.04560,
  section 3.5) with its defaults. b = min(0.999, 1 - t**-0.8), so b = 0 at t = 1, and q = g**2 + 1e-30.
  Two dimensions of at least 32 (the two largest; `weight`) are factored: r = b r + (1 - b) mean(q, axis=0),
  c = b c + (1 - b) mean(q, axis=1), u = g / sqrt(outer(c, r) / mean(r)); `bias` and `kernel` are not:
  v = b v + (1 - b) q, u = g / sqrt(v). No bias correction, no clipping of u, no step relative to |p|. Then
  m = 0.9 m + 0.1 u without bias correction, and p -= lr * (m + 0.03 * p), on all three. Two things differ
  from big_vision: m is float32 there where bfloat16 is its default (0.9 m is a float32 product here, the
  rest float64), and its decay would not be times lr but as in `adamw_bigvision`.
- `adamw_bigvision`: the chain of big_vision's make. With lr0 = 0.05 the peak (learning_rates[3]) and the
  schedule's factor s = lr / lr0: p -= s * (lr0 * adam + 0.01 * p), where adam is optax.scale_by_adam's
  (m / (1 - 0.9**t)) / (sqrt(v / (1 - 0.999**t)) + 1e-8), with m and v as in `lamb`. The decay is on all
  three (big_vision's own default is on kernels alone).
- `adamw_groups`: torch's AdamW, betas 0.9 and 0.999, epsilon 1e-8. With l = lr * 0.25, 0.5, 1.0 and
  w = 0.3, 0.3, 0 for `weight`, `kernel`, `bias`: p -= l * w * p, then p -= l * adam.
- `ema_warmup`: timm's ModelEmaV3(decay=0.99, use_warmup=True) of the `adamw_groups` parameters, begun at
  the initial ones and updated after each step with step=t, as timm's train.py counts. With d the decay,
  average = d * average + (1 - d) * p. d = 0 at t = 1, which copies p; then, with timm's warmup_gamma 1,
  warmup_power 2/3, update_after_step 0 and min_decay 0, d = min(0.99, 1 - t**(-2/3)): timm's formula is
  1 - (1 + k / gamma)**-power with k = t - update_after_step - 1. d is 0.370 at t = 2 and 0.864 at
  t = 20; it would reach 0.99 at t = 1000.
- `ema`: ModelEmaV3(decay=0.9) of the same: d = 0 at t = 1, then 0.9.

`learning_rates`, `gradient_scales` and `grad_norms` (global, before clipping) [20]; `ema_warmup/decays` and
`ema/decays` [20]; for each of the seven above, `OPTIMIZER/NAME` [4, *S], after steps 5, 10, 15, 20. Inputs
are exact in float32; results are float64 rounded to float32.
"""

from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import timm.optim
import timm.utils
import torch
from closed_form import uniform
from make_optimizers import MAX_NORM, NUM_STEPS, learning_rates
from torch import nn

SHAPES: dict[str, tuple[int, ...]] = {"weight": (34, 33), "bias": (5,), "kernel": (3, 2, 2)}
# The norms, of 1139 values, are about 19.5 times these: from 0.15 to 5, half of them above MAX_NORM.
GRADIENT_SCALES = 0.5 ** np.array([4, 6, 2, 5, 7, 3, 3, 6, 4, 2, 5, 7, 2, 6, 3, 5, 4, 7, 5, 3])
STORED_STEPS = slice(4, None, 5)  # after steps 5, 10, 15, 20

Array = npt.NDArray[np.float64]
Tensors = dict[str, Array]  # by name: parameters [*S], or of all steps [NUM_STEPS, *S]


def clipped_gradients() -> tuple[Tensors, Array]:
    """Return the gradients of all steps after torch's clipping, and the global norms [NUM_STEPS] before it."""
    drawn = {name: uniform(f"grad/{name}", (NUM_STEPS, *shape)).astype(np.float64) for name, shape in SHAPES.items()}
    clipped: dict[str, list[Array]] = {name: [] for name in SHAPES}
    norms: list[float] = []
    for step, scale in enumerate(GRADIENT_SCALES):
        holders = {name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
        for name, holder in holders.items():
            holder.grad = torch.from_numpy(drawn[name][step] * scale)
        norms.append(nn.utils.clip_grad_norm_(holders.values(), MAX_NORM).item())
        for name, holder in holders.items():
            assert holder.grad is not None
            clipped[name].append(holder.grad.numpy().copy())
    return {name: np.stack(values) for name, values in clipped.items()}, np.array(norms)


def torch_parameters(values: Tensors) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.from_numpy(value.copy())) for name, value in values.items()}


def run_torch(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, gradients: Tensors, rates: Array
) -> Tensors:
    """Return the parameters after each step. A group's `lr_scale` multiplies the step's learning rate."""
    history: dict[str, list[Array]] = {name: [] for name in parameters}
    for step, rate in enumerate(rates):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradients[name][step])
        for group in optimizer.param_groups:
            group["lr"] = float(rate) * group.get("lr_scale", 1.0)
        optimizer.step()
        for name, parameter in parameters.items():
            history[name].append(parameter.detach().numpy().copy())
    return {name: np.stack(values) for name, values in history.items()}


def run_optax(initial: Tensors, transformation: optax.GradientTransformation, gradients: Tensors) -> Tensors:
    """Return the parameters after each step. The transformation contains the learning-rate schedule."""
    parameters = {name: jnp.asarray(value) for name, value in initial.items()}
    state = transformation.init(parameters)
    history: dict[str, list[Array]] = {name: [] for name in initial}
    for step in range(NUM_STEPS):
        gradient = {name: jnp.asarray(gradients[name][step]) for name in initial}
        updates, state = transformation.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        for name, value in parameters.items():
            assert value.dtype == jnp.float64, name
            history[name].append(np.array(value))
    return {name: np.stack(values) for name, values in history.items()}


def lamb(initial: Tensors, gradients: Tensors, rates: Array) -> Tensors:
    parameters = torch_parameters(initial)
    groups = [
        {"params": [parameters["weight"], parameters["kernel"]], "weight_decay": 0.05},
        {"params": [parameters["bias"]], "weight_decay": 0.0},
    ]
    optimizer = timm.optim.Lamb(groups, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, max_grad_norm=None)
    return run_torch(parameters, optimizer, gradients, rates)


def adamw_groups(initial: Tensors, gradients: Tensors, rates: Array) -> Tensors:
    parameters = torch_parameters(initial)
    groups = [
        {"params": [parameters["weight"]], "lr_scale": 0.25, "weight_decay": 0.3},
        {"params": [parameters["kernel"]], "lr_scale": 0.5, "weight_decay": 0.3},
        {"params": [parameters["bias"]], "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    return run_torch(parameters, torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8), gradients, rates)


def lion(initial: Tensors, gradients: Tensors, rates: Array) -> Tensors:
    assert_clear_signs(gradients)
    by_step = jnp.asarray(rates)
    transformation = optax.lion(lambda count: by_step[count], b1=0.9, b2=0.99, weight_decay=0.1)
    return run_optax(initial, transformation, gradients)


def assert_clear_signs(gradients: Tensors) -> None:
    """Assert that no sum whose sign Lion uses is so close to 0 that its sign may differ in float32."""
    for name, gradient in gradients.items():
        momentum = np.zeros(SHAPES[name])
        for g in gradient:
            old, new = 0.9 * momentum, 0.1 * g
            assert (np.abs(old + new) > 1e-4 * (np.abs(old) + np.abs(new))).all(), name
            momentum = 0.99 * momentum + 0.01 * g


def adafactor(initial: Tensors, gradients: Tensors, rates: Array) -> Tensors:
    by_step = jnp.asarray(rates)
    transformation = optax.chain(
        optax.scale_by_factored_rms(
            factored=True,
            decay_rate=0.8,
            min_dim_size_to_factor=32,
            epsilon=1e-30,
            decay_rate_fn=lambda count, exponent: jnp.minimum(0.999, 1.0 - (count + 1.0) ** -exponent),
        ),
        optax.ema(0.9, debias=False, accumulator_dtype=jnp.float32),
        optax.add_decayed_weights(0.03),
        optax.scale_by_schedule(lambda count: by_step[count]),
        optax.scale(-1.0),
    )
    return run_optax(initial, transformation, gradients)


def adamw_bigvision(initial: Tensors, gradients: Tensors, rates: Array) -> Tensors:
    peak = float(rates.max())
    factor_by_step = jnp.asarray(rates / peak)
    transformation = optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.scale(peak),
        optax.add_decayed_weights(0.01),
        optax.scale_by_schedule(lambda count: factor_by_step[count]),
        optax.scale(-1.0),
    )
    return run_optax(initial, transformation, gradients)


def average(initial: Tensors, history: Tensors, decay: float, warmup: bool) -> tuple[Tensors, Array]:
    """Return timm's averages after each step, and the decay of each step [NUM_STEPS]."""
    model = nn.ParameterDict(torch_parameters(initial))
    ema = timm.utils.ModelEmaV3(model, decay=decay, use_warmup=warmup)
    averages: dict[str, list[Array]] = {name: [] for name in initial}
    decays: list[float] = []
    for index in range(NUM_STEPS):
        model.load_state_dict({name: torch.from_numpy(values[index]) for name, values in history.items()})
        ema.update(model, step=index + 1)
        decays.append(ema.get_decay(index + 1))
        for name, value in ema.module.state_dict().items():
            averages[name].append(value.numpy().copy())
    return {name: np.stack(values) for name, values in averages.items()}, np.array(decays)


def main() -> None:
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)
    initial = {name: uniform(f"initial/{name}", shape).astype(np.float64) for name, shape in SHAPES.items()}
    gradients, norms = clipped_gradients()
    assert (norms > MAX_NORM).sum() == NUM_STEPS // 2
    rates = learning_rates().astype(np.float64)
    histories = {
        "lamb": lamb(initial, gradients, rates),
        "lion": lion(initial, gradients, rates),
        "adafactor": adafactor(initial, gradients, rates),
        "adamw_bigvision": adamw_bigvision(initial, gradients, rates),
        "adamw_groups": adamw_groups(initial, gradients, rates),
    }
    histories["ema_warmup"], warmup_decays = average(initial, histories["adamw_groups"], decay=0.99, warmup=True)
    histories["ema"], plain_decays = average(initial, histories["adamw_groups"], decay=0.9, warmup=False)
    arrays: dict[str, npt.ArrayLike] = {
        "learning_rates": rates,
        "gradient_scales": GRADIENT_SCALES,
        "grad_norms": norms,
        "ema_warmup/decays": warmup_decays,
        "ema/decays": plain_decays,
    }
    for optimizer, history in histories.items():
        for name in SHAPES:
            arrays[f"{optimizer}/{name}"] = history[name][STORED_STEPS]
    golden.write(Path(__file__).with_name("optimizers_of_recipes.npz"), arrays)


if __name__ == "__main__":
    main()

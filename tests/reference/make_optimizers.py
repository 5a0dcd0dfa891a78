"""Make optimizers.npz: 20 steps of torch's AdamW and SGD with clipping, in float64.

Each step: the gradients of that step, clip_grad_norm_(max_norm=1.0) over all parameters, the
step's learning rate, then the optimizer. The gradients are given, independent of the parameters,
so both optimizers see the same ones.

- `adamw`: betas (0.9, 0.999), epsilon 1e-8, weight decay 0.3, decoupled and times the learning rate:
  p -= lr * 0.3 * p before Adam's update. Epsilon is added to sqrt(v / (1 - beta2**t)).
- `sgd`: momentum 0.9, no dampening, no Nesterov, weight decay 1e-4 as L2. The decay comes after
  the clipping, as in torch: the clip sees the raw gradient, then the optimizer adds 1e-4 * p.
  The first step's momentum buffer is the gradient itself.

Weight decay acts on all three tensors, whatever their names.

torch clips by min(1, max_norm / (norm + 1e-6)), where Paddle's ClipGradByGlobalNorm divides by
max(norm, max_norm): a clipped gradient differs by up to 1e-6 of itself, so SGD's updates do too.

`learning_rates` [20]; `grad_norms` [20], global and before clipping; with S the shape of `weight`
[7, 5], `bias` [5], `kernel` [3, 2, 2]: `initial/NAME` S, `grad/NAME` [20, *S], and the parameters
after each step, `adamw/NAME` and `sgd/NAME` [20, *S]. Inputs are exact in float32; results are
float64 rounded to float32.
"""

from collections.abc import Callable
from pathlib import Path

import golden
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

SEED = 20240818
NUM_STEPS = 20
MAX_NORM = 1.0
SHAPES: dict[str, tuple[int, ...]] = {"weight": (7, 5), "bias": (5,), "kernel": (3, 2, 2)}

Array = npt.NDArray[np.float32]


def learning_rates() -> Array:
    """Return [NUM_STEPS] rates: four steps of linear warmup to 0.05, then a cosine down to 0.0005."""
    step = np.arange(NUM_STEPS)
    warmup = 0.05 * (step + 1) / 4
    cosine = 0.0005 + 0.0495 * (1 + np.cos(np.pi * (step - 3) / (NUM_STEPS - 4))) / 2
    return np.where(step < 4, warmup, cosine).astype(np.float32)


def random_gradients(rng: np.random.Generator) -> dict[str, Array]:
    """Return gradients [NUM_STEPS, *shape] by name, whose global norms are 0.2 to 5 in random order."""
    norms = rng.permutation(np.geomspace(0.2, 5.0, NUM_STEPS))
    drawn = {name: rng.standard_normal((NUM_STEPS, *shape)) for name, shape in SHAPES.items()}
    squares = sum(np.square(g).reshape(NUM_STEPS, -1).sum(axis=1) for g in drawn.values())
    scale = norms / np.sqrt(squares)  # [NUM_STEPS]
    return {name: (g * scale.reshape(-1, *[1] * (g.ndim - 1))).astype(np.float32) for name, g in drawn.items()}


def run(
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    initial: dict[str, Array],
    gradients: dict[str, Array],
    rates: Array,
) -> tuple[dict[str, npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """Return the parameters after each step, by name, and the global gradient norms before clipping."""
    parameters = {n: nn.Parameter(torch.from_numpy(v).double()) for n, v in initial.items()}
    optimizer = make_optimizer(list(parameters.values()))
    history: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in initial}
    norms: list[float] = []
    for step, rate in enumerate(rates):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradients[name][step]).double()
        norms.append(nn.utils.clip_grad_norm_(parameters.values(), MAX_NORM).item())
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        optimizer.step()
        for name, parameter in parameters.items():
            history[name].append(parameter.detach().numpy().copy())
    return {name: np.stack(values) for name, values in history.items()}, np.array(norms)


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    initial = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in SHAPES.items()}
    gradients = random_gradients(rng)
    rates = learning_rates()
    adamw, norms = run(
        lambda p: torch.optim.AdamW(p, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.3),
        initial,
        gradients,
        rates,
    )
    sgd, _ = run(lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=1e-4), initial, gradients, rates)
    assert (norms > MAX_NORM).sum() == NUM_STEPS // 2
    arrays: dict[str, npt.ArrayLike] = {"learning_rates": rates, "grad_norms": norms}
    for name in SHAPES:
        arrays[f"initial/{name}"] = initial[name]
        arrays[f"grad/{name}"] = gradients[name]
        arrays[f"adamw/{name}"] = adamw[name]
        arrays[f"sgd/{name}"] = sgd[name]
    golden.write(Path(__file__).with_name("optimizers.npz"), arrays)


if __name__ == "__main__":
    main()

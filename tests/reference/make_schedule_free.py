"""Make schedule_free.npz: 20 steps of the authors' Schedule-Free AdamW, in float64.

With S the shape of `weight` [34, 33], `bias` [5], `kernel` [3, 2, 2], these inputs are computed, not stored:

- the initial parameters: closed_form.uniform(f"initial/{name}", S)
- step t's gradient: closed_form.uniform(f"grad/{name}", (20, *S))[t - 1] * gradient_scales[t - 1]

The gradients do not depend on the parameters, and none is clipped. The optimizer is `AdamWScheduleFree` of the package
schedulefree (facebookresearch/schedule_free, arXiv 2405.15682); its `AdamWScheduleFreeReference`, which stores the
three sequences x, y and z, agrees within 1e-12. Learning rate 0.05 with 6 steps of warmup, betas (0.9, 0.99), epsilon
1e-8. Weight decay 0.3, at y, on `weight` and `kernel`; learning rates times 0.25, 0.5 and 1.0 for `weight`, `kernel`
and `bias`.

`gradient_scales` [20]; `x/NAME` and `y/NAME` [4, *S] after steps 5, 10, 15 and 20: the average,
which `eval()` puts into the parameters, and where the gradients are taken, which `train()` does. Inputs are exact in
float32; results are float64 rounded to float32.
"""

from pathlib import Path
from typing import Any

import golden
import numpy as np
import numpy.typing as npt
import torch
from closed_form import uniform
from schedulefree import AdamWScheduleFree, AdamWScheduleFreeReference
from torch import nn

NUM_STEPS, NUM_WARMUP_STEPS, RATE, BETAS = 20, 6, 0.05, (0.9, 0.99)
SHAPES: dict[str, tuple[int, ...]] = {"weight": (34, 33), "bias": (5,), "kernel": (3, 2, 2)}
GRADIENT_SCALES = 0.5 ** np.array([4, 6, 2, 5, 7, 3, 3, 6, 4, 2, 5, 7, 2, 6, 3, 5, 4, 7, 5, 3])
STORED_STEPS = slice(4, None, 5)
GROUPS: dict[str, dict[str, float]] = {
    "weight": {"lr": 0.25 * RATE, "weight_decay": 0.3},
    "kernel": {"lr": 0.5 * RATE, "weight_decay": 0.3},
    "bias": {"lr": RATE, "weight_decay": 0.0},
}

Array = npt.NDArray[np.float64]


def run(make_optimizer: Any) -> dict[str, Array]:
    """Return the sequences x and y of each parameter, `x/NAME` and `y/NAME` [NUM_STEPS, *S]."""
    parameters = {
        name: nn.Parameter(torch.from_numpy(uniform(f"initial/{name}", shape).astype(np.float64)))
        for name, shape in SHAPES.items()
    }
    gradients = {
        name: uniform(f"grad/{name}", (NUM_STEPS, *shape)).astype(np.float64) for name, shape in SHAPES.items()
    }
    optimizer = make_optimizer(
        [{"params": [parameters[name]], **group} for name, group in GROUPS.items()],
        betas=BETAS,
        eps=1e-8,
        warmup_steps=NUM_WARMUP_STEPS,
    )
    history: dict[str, list[Array]] = {f"{kind}/{name}": [] for kind in "xy" for name in SHAPES}
    for step in range(NUM_STEPS):
        optimizer.train()
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradients[name][step] * GRADIENT_SCALES[step])
        optimizer.step()
        for kind, enter in (("y", optimizer.train), ("x", optimizer.eval)):
            enter()
            for name, parameter in parameters.items():
                history[f"{kind}/{name}"].append(parameter.detach().numpy().copy())
    return {name: np.stack(values) for name, values in history.items()}


def main() -> None:
    torch.set_num_threads(1)
    arrays: dict[str, npt.ArrayLike] = {"gradient_scales": GRADIENT_SCALES}
    history, reference = run(AdamWScheduleFree), run(AdamWScheduleFreeReference)
    for name, values in history.items():
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, reference[name], rtol=0, atol=1e-12, err_msg=name)
        arrays[name] = values[STORED_STEPS]
    golden.write(Path(__file__).with_name("schedule_free.npz"), arrays)


if __name__ == "__main__":
    main()

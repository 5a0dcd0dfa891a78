"""Make muon.npz: 20 steps of timm's Muon, and of its author's, in float64.

The shapes are those of this program, whose linear layers have [inputs, outputs]: `wide` [12, 20], `tall` [20, 9],
`kernel` [10, 3, 2, 2], `head` [9, 5], `bias` [9]. PyTorch's parameters are transposed, except for the kernel. These
inputs are computed, not stored:

- the initial parameters: closed_form.uniform(f"initial/{name}", shape)
- step t's gradient: closed_form.uniform(f"grad/{name}", (20, *shape))[t - 1]; in step 1 all are 0

The gradients do not depend on the parameters, and none is clipped. Both programs orthogonalize in bfloat16, here in
float64: that dtype is an argument of timm's function, and the method `bfloat16` is replaced for the author's. Learning
rate 0.02, momentum 0.95, weight decay 0.1 on all but `bias`; AdamW with betas (0.9, 0.95) for `head` and `bias`.

- `timm`: timm.optim.Muon, its defaults: no Nesterov momentum, coefficients "quintic", scale "match_rms_adamw";
  AdamW's learning rate 0.02, epsilon 1e-7.
- `author`: SingleDeviceMuonWithAuxAdam of https://github.com/KellerJordan/Muon (857d1ad): Nesterov momentum, the
  original coefficients and scale; AdamW's learning rate 0.02 * 0.015, epsilon 1e-10. Without `kernel`, whose
  scale it computes from the last two axes, its height and width.

`CASE/NAME` [4, *shape] after steps 5, 10, 15 and 20. Inputs are exact in float32; results are float64 rounded to
float32.

Usage: python make_muon.py FOLDER, a checkout of that repository.
"""

import sys
from functools import partial
from pathlib import Path

import golden
import numpy as np
import numpy.typing as npt
import timm.optim.muon
import torch
from closed_form import uniform
from torch import nn

NUM_STEPS, RATE, DECAY = 20, 0.02, 0.1
SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (12, 20),
    "tall": (20, 9),
    "kernel": (10, 3, 2, 2),
    "head": (9, 5),
    "bias": (9,),
}
BY_ADAMW = ("head", "bias")
STORED_STEPS = slice(4, None, 5)

Array = npt.NDArray[np.float64]


def as_torch(value: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value.T if value.ndim == 2 else value))


def run(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Array]:
    """Return the parameters after each step, [NUM_STEPS, *shape]."""
    history: dict[str, list[Array]] = {name: [] for name in parameters}
    for step in range(NUM_STEPS):
        for name, parameter in parameters.items():
            gradient = uniform(f"grad/{name}", (NUM_STEPS, *SHAPES[name]))[step].astype(np.float64)
            parameter.grad = as_torch(gradient * (step > 0))
        optimizer.step()
        for name, parameter in parameters.items():
            value = parameter.detach().numpy()
            history[name].append((value.T if value.ndim == 2 else value).copy())
    return {name: np.stack(values) for name, values in history.items()}


def initial(names: list[str]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(as_torch(uniform(f"initial/{name}", SHAPES[name]).astype(np.float64))) for name in names}


def decay_of(name: str) -> float:
    return 0.0 if name == "bias" else DECAY


def run_timm() -> dict[str, Array]:
    in_bfloat16 = timm.optim.muon.zeropower_via_newtonschulz
    timm.optim.muon.zeropower_via_newtonschulz = partial(in_bfloat16, dtype=torch.float64)
    parameters = initial(list(SHAPES))
    groups = [
        {"params": [parameter], "weight_decay": decay_of(name), "use_fallback": name in BY_ADAMW}
        for name, parameter in parameters.items()
    ]
    return run(parameters, timm.optim.muon.Muon(groups, lr=RATE))


def run_author(folder: Path) -> dict[str, Array]:
    sys.path.insert(0, str(folder))
    from muon import SingleDeviceMuonWithAuxAdam

    torch.Tensor.bfloat16 = lambda tensor: tensor  # type: ignore[method-assign, assignment]
    parameters = initial([name for name in SHAPES if name != "kernel"])
    groups = []
    for name, parameter in parameters.items():
        group = {"params": [parameter], "weight_decay": decay_of(name), "use_muon": name not in BY_ADAMW}
        if name in BY_ADAMW:
            groups.append({**group, "lr": RATE * 0.015, "betas": (0.9, 0.95), "eps": 1e-10})
        else:
            groups.append({**group, "lr": RATE, "momentum": 0.95})
    return run(parameters, SingleDeviceMuonWithAuxAdam(groups))


def main() -> None:
    torch.set_num_threads(1)
    cases = {"timm": run_timm(), "author": run_author(Path(sys.argv[1]))}
    arrays: dict[str, npt.ArrayLike] = {}
    for case, history in cases.items():
        for name, values in history.items():
            assert values.dtype == np.float64
            arrays[f"{case}/{name}"] = values[STORED_STEPS]
    golden.write(Path(__file__).with_name("muon.npz"), arrays)


if __name__ == "__main__":
    main()

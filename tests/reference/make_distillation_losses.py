"""Make distillation_losses.npz: DeiT's losses with a teacher and the regression of features, by torch in float64.

Inputs, exact in float32: `logits`, `token_logits` and `teacher_logits` [6, 7] in (-5, 5), `labels` [6], `features` and
`teacher_features` [6, 24].

For each loss, `LOSS/loss` [] and its derivatives `LOSS/gradient` with respect to the logits, or the features. With the
weight w = 0.3:

- `hard`: (1 - w) * cross_entropy(logits, labels) + w * cross_entropy(logits, argmax of the teacher's), as in
  DistillationLoss of facebookresearch/deiT (losses.py, distillation_type "hard"), with one head.
- `soft`: the same with w * T^2 * KL(softmax(teacher / T), softmax(logits / T)), T = 3, the mean over the images:
  equation 2 of arXiv 2012.12877. `soft_in_deits_code` [] is that term as DeiT's code has it, divided by the number of
  classes as well (kl_div summed, / numel).
- `token`: `hard` with the distillation token's logits in the teacher's term; `token/token_gradient` too.
- `features`: smooth L1 loss with beta = 2 against the teacher's features after a layer norm without scale and shift,
  the mean over images and channels (arXiv 2205.14141, its defaults).
"""

from pathlib import Path

import golden
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from closed_form import uniform
from torch import Tensor

NUM_CLASSES, WIDTH = 7, 24
LABELS = np.array([3, 0, 6, 6, 2, 5])
WEIGHT, TEMPERATURE = 0.3, 3.0


def main() -> None:
    torch.set_num_threads(1)
    shapes = {name: (len(LABELS), NUM_CLASSES) for name in ("logits", "token_logits", "teacher_logits")}
    shapes |= {name: (len(LABELS), WIDTH) for name in ("features", "teacher_features")}
    inputs = {name: (5 * uniform(name, shape)).astype(np.float32) for name, shape in shapes.items()}
    tensors = {name: torch.from_numpy(value).double().requires_grad_() for name, value in inputs.items()}
    labels, teacher = torch.from_numpy(LABELS), tensors["teacher_logits"].detach()
    arrays: dict[str, npt.ArrayLike] = {**inputs, "labels": LABELS}

    def record(name: str, loss: Tensor, **wanted: str) -> None:
        arrays[f"{name}/loss"] = loss.item()
        for key, of in wanted.items():
            (gradient,) = torch.autograd.grad(loss, tensors[of], retain_graph=True)
            arrays[f"{name}/{key}"] = gradient.numpy()

    label_loss = F.cross_entropy(tensors["logits"], labels)
    hard = F.cross_entropy(tensors["logits"], teacher.argmax(dim=1))
    record("hard", (1 - WEIGHT) * label_loss + WEIGHT * hard, gradient="logits")
    log_p = F.log_softmax(tensors["logits"] / TEMPERATURE, dim=1)
    log_q = F.log_softmax(teacher / TEMPERATURE, dim=1)
    divergence = F.kl_div(log_p, log_q, reduction="sum", log_target=True) * TEMPERATURE**2
    record("soft", (1 - WEIGHT) * label_loss + WEIGHT * divergence / len(LABELS), gradient="logits")
    arrays["soft_in_deits_code"] = (divergence / log_p.numel()).item()
    token = F.cross_entropy(tensors["token_logits"], teacher.argmax(dim=1))
    loss = (1 - WEIGHT) * label_loss + WEIGHT * token
    record("token", loss, gradient="logits", token_gradient="token_logits")
    target = F.layer_norm(tensors["teacher_features"].detach(), (WIDTH,), eps=1e-6)
    record("features", F.smooth_l1_loss(tensors["features"], target, beta=2.0), gradient="features")
    golden.write(Path(__file__).with_name("distillation_losses.npz"), arrays)


if __name__ == "__main__":
    main()

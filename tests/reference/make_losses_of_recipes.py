"""Make losses_of_recipes.npz: the losses of known ViT recipes and their gradients, in float64.

Inputs, exact in float32: `logits` z [6, 7] in (-5, 5), `labels` [6] int64, and `soft_targets` [6, 7], as
from mixup: row i is lambda_i for its label and 1 - lambda_i for the label of row 5 - i. Rows 2 and 3 have the
same label, so their targets are one-hot. They contain no label smoothing.

For each loss, `LOSS/loss` [] and `LOSS/gradient` [6, 7], the derivative with respect to the logits. With y
the targets, B = 6 images and C = 7 classes, every binary loss is the mean over all B * C elements of
-(y log sigmoid(z) + (1 - y) log(1 - sigmoid(z))), so its gradient is (sigmoid(z) - y) / (B * C); the loss
summed over the classes (big_vision's sigmoid loss) is C times this. Every softmax loss is the mean over
the B images of -sum(y log softmax(z)), with the gradient (softmax(z) - y) / B, as the y of a row sum to 1.

- `bce_labels`: timm's BinaryCrossEntropy(smoothing=0.1) of the labels: y = 0.1 / C, and 0.9 + 0.1 / C at
  the label.
- `bce_thresholded`: timm's BinaryCrossEntropy(target_threshold=0.0) of the soft targets: y is 1 where the
  target is above 0, so up to two 1s per row. timm smooths only labels, not targets of this shape; with
  smoothed targets, every y would be 1.
- `bce_soft`: torch's BCEWithLogitsLoss of the soft targets.
- `ce_soft`: timm's SoftTargetCrossEntropy of the soft targets.
- `ce_labels`: timm's LabelSmoothingCrossEntropy(0.1) of the labels, with the y of `bce_labels`.

Results are float64 rounded to float32.
"""

from collections.abc import Callable
from pathlib import Path

import golden
import numpy as np
import numpy.typing as npt
import timm.loss
import torch
from closed_form import uniform
from torch import Tensor, nn

NUM_CLASSES = 7
LABELS = np.array([3, 0, 6, 6, 2, 5])
LAMBDAS = np.array([0.8125, 0.5, 0.25, 0.625, 0.0625, 0.9375])


def soft_targets() -> npt.NDArray[np.float64]:
    one_hot: npt.NDArray[np.float64] = np.eye(NUM_CLASSES)[LABELS]  # [6, 7]
    return LAMBDAS[:, None] * one_hot + (1 - LAMBDAS[:, None]) * one_hot[::-1]


def main() -> None:
    torch.set_num_threads(1)
    logits = (5 * uniform("logits", (len(LABELS), NUM_CLASSES))).astype(np.float32)
    labels, soft = torch.from_numpy(LABELS), torch.from_numpy(soft_targets())
    losses: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
        "bce_labels": (timm.loss.BinaryCrossEntropy(smoothing=0.1), labels),
        "bce_thresholded": (timm.loss.BinaryCrossEntropy(smoothing=0.1, target_threshold=0.0), soft),
        "bce_soft": (nn.BCEWithLogitsLoss(), soft),
        "ce_soft": (timm.loss.SoftTargetCrossEntropy(), soft),
        "ce_labels": (timm.loss.LabelSmoothingCrossEntropy(0.1), labels),
    }
    arrays: dict[str, npt.ArrayLike] = {"logits": logits, "labels": LABELS, "soft_targets": soft.numpy()}
    for name, (loss_function, target) in losses.items():
        z = torch.from_numpy(logits).double().requires_grad_()
        loss = loss_function(z, target)
        (gradient,) = torch.autograd.grad(loss, z)
        arrays[f"{name}/loss"] = loss.item()
        arrays[f"{name}/gradient"] = gradient.numpy()
    golden.write(Path(__file__).with_name("losses_of_recipes.npz"), arrays)


if __name__ == "__main__":
    main()

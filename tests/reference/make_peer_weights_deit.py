"""Make weights/timm_deit_distilled.safetensors, weights/hf_deit_distilled/ and weights/deit.npz: distilled DeiTs of
timm and Hugging Face with random weights, saved as these programs do, and their logits in float64.

For each case: two images, `CASE/images` [2, 3, 12, 12], and their logits in evaluation, the mean of both heads',
`CASE/logits` [2, 7]; `CASE/heads` [2, 2, 7] has those of the class token's head and of the distillation token's. Sizes
as in make_peer_weights_torch.py.
"""

import json
import shutil

import golden
import numpy as np
import peer_weights as peers
import torch
from make_peer_weights_torch import COMMON, randomized
from peer_weights import DEPTH, FOLDER, HEADS, MLP_DIM, NUM_CLASSES, PATCH, SQUARE, WIDTH
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher


def main() -> None:
    torch.set_num_threads(1)
    arrays = {}
    case = "timm_deit_distilled"
    model = VisionTransformerDistilled(
        img_size=SQUARE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=MLP_DIM / WIDTH,
        num_classes=NUM_CLASSES,
    )
    randomized(case, model)
    save_file(model.state_dict(), FOLDER / f"{case}.safetensors")
    images = peers.images(case, SQUARE)
    inputs = torch.from_numpy(images).double()
    with torch.no_grad():
        logits = model.double()(inputs).numpy()
        model.set_distilled_training(True)
        model.train()  # the model has no dropout
        heads = np.stack([each.numpy() for each in model(inputs)])
    arrays |= {f"{case}/images": images, f"{case}/logits": logits, f"{case}/heads": heads}
    case = "hf_deit_distilled"
    config = DeiTConfig(**COMMON, intermediate_size=MLP_DIM)
    model = randomized(case, DeiTForImageClassificationWithTeacher(config))
    shutil.rmtree(FOLDER / case, ignore_errors=True)
    model.save_pretrained(FOLDER / case)
    peers.write_json(FOLDER / case / "config.json", json.loads((FOLDER / case / "config.json").read_text()))
    images = peers.images(case, SQUARE)
    with torch.no_grad():
        output = model.double()(torch.from_numpy(images).double())
    heads = np.stack([output.cls_logits.numpy(), output.distillation_logits.numpy()])
    arrays |= {f"{case}/images": images, f"{case}/logits": output.logits.numpy(), f"{case}/heads": heads}
    golden.write(FOLDER / "deit.npz", arrays)


if __name__ == "__main__":
    main()

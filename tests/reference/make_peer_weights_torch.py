"""Make weights/timm_*.safetensors, weights/hf_*/ and weights/torch.npz: ViTs of timm and Hugging Face with random
weights, saved as these programs do, and their logits in float64.

For each case: two images, `CASE/images` [2, 3, height, width], and their logits, `CASE/logits` [2, 7]. Width 20, 2
blocks, 4 heads, mlp_dim 36, patches of 4.

- timm_vit: class token, 12x20 pixels
- timm_avg_fc_norm: mean of the patches, then a norm (fc_norm), with an unused class token: MAE's finetuning
- timm_gap_no_class: no class token
- timm_deit3: LayerScale, no position for the class token (no_embed_class): DeiT III
- timm_dinov2_reg: four registers, LayerScale, no position for class token and registers
- hf_vit: ViTForImageClassification, whose LayerNorm has an epsilon of 1e-12
- hf_dinov2, hf_dinov2_registers: class token and mean of the patches side by side, LayerScale
"""

import json
import shutil

import peer_weights as peers
import torch
from peer_weights import DEPTH, FOLDER, HEADS, IMAGE_SIZE, MLP_DIM, NUM_CLASSES, PATCH, SQUARE, WIDTH
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

TIMM = {
    "timm_vit": (IMAGE_SIZE, {}),
    "timm_avg_fc_norm": (SQUARE, {"global_pool": "avg", "fc_norm": True}),
    "timm_gap_no_class": (IMAGE_SIZE, {"global_pool": "avg", "class_token": False, "fc_norm": False}),
    "timm_deit3": (SQUARE, {"init_values": 1e-6, "no_embed_class": True}),
    "timm_dinov2_reg": (SQUARE, {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}),
}
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "patch_size": PATCH,
    "image_size": SQUARE[0],
    "num_labels": NUM_CLASSES,
}
HUGGING_FACE = {
    "hf_vit": lambda: ViTForImageClassification(ViTConfig(**COMMON, intermediate_size=MLP_DIM)),
    # Dinov2Config requires an integer mlp_ratio.
    "hf_dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**COMMON, mlp_ratio=2)),
    "hf_dinov2_registers": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**COMMON, mlp_ratio=2, num_register_tokens=4)
    ),
}


def randomized(case: str, model: nn.Module) -> nn.Module:
    state = {
        name: torch.tensor(peers.random_values(case, name, tuple(value.shape)))
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


def main() -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    results = {}
    for case, (size, changed) in TIMM.items():
        model = VisionTransformer(
            img_size=size,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=MLP_DIM / WIDTH,
            num_classes=NUM_CLASSES,
            **changed,
        )
        randomized(case, model)
        save_file(model.state_dict(), FOLDER / f"{case}.safetensors")
        images = peers.images(case, size)
        with torch.no_grad():
            results[case] = (images, model.double()(torch.from_numpy(images).double()).numpy())
    for case, make in HUGGING_FACE.items():
        model = randomized(case, make())
        shutil.rmtree(FOLDER / case, ignore_errors=True)
        model.save_pretrained(FOLDER / case)
        config = json.loads((FOLDER / case / "config.json").read_text())
        peers.write_json(FOLDER / case / "config.json", config)
        images = peers.images(case, SQUARE)
        with torch.no_grad():
            results[case] = (images, model.double()(torch.from_numpy(images).double()).logits.numpy())
    peers.record(results, "torch.npz")


if __name__ == "__main__":
    main()

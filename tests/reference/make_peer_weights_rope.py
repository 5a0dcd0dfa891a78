"""Make weights/rope_*.safetensors, weights/rope_hf_*/ and weights/rope.npz: small models with rotary positions or gated
MLPs, with random weights as their programs save them, and their output in float64.

Run with folders of checkouts: `make_peer_weights_rope.py DINOV3 EVA ROPE_VIT VIT5`, of
https://github.com/facebookresearch/dinov3, baaivision/EVA, naver-ai/rope-vit and wangf3014/ViT-5. Beside timm and
transformers it needs einops. Modules that these programs import and that only run on GPUs are replaced: apex's
FusedLayerNorm by LayerNorm, and xformers' SwiGLU by its definition.

For each case: two images, `CASE/images` [2, 3, height, width], and their logits, `CASE/logits` [2, 7], or the features
of a model without a head [2, 16]. `CASE/other_images` and `CASE/other_logits` are of the same weights at another image
size, for which the program resamples or computes its positions. Width 16, 1 block (2 if frequencies are learned), 2
heads, patches of 3, 9x15 pixels, and 12x9 as the other size.
"""

import importlib
import json
import shutil
import sys
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import golden
import numpy as np
import numpy.typing as npt
import peer_weights as peers
import torch
from peer_weights import FOLDER, NUM_CLASSES
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

WIDTH, HEADS, PATCH, HIDDEN = 16, 2, 3, 24
IMAGE_SIZE, OTHER_SIZE, SQUARE = (9, 15), (12, 9), (9, 9)

Outputs = dict[str, npt.ArrayLike]
Build = Callable[[tuple[int, int]], nn.Module]


def timm_eva(**changed: Any) -> Build:
    """Return a function that builds a model of timm's Eva class for an image size."""

    def build(size: tuple[int, int]) -> nn.Module:
        common: dict[str, Any] = {"embed_dim": WIDTH, "num_heads": HEADS, "patch_size": PATCH, "mlp_ratio": 1.5}
        common |= {"depth": 1, "num_classes": NUM_CLASSES, "use_rot_pos_emb": True}
        return Eva(img_size=size, **common | changed)

    return build


TIMM_DINOV3: dict[str, Any] = {
    "use_abs_pos_emb": False,
    "num_reg_tokens": 4,
    "init_values": 1e-5,
    "use_fc_norm": False,
    "rope_type": "dinov3",
    "rope_temperature": 100.0,
    "rope_rotate_half": True,
    "norm_layer": partial(nn.LayerNorm, eps=1e-5),
}
TIMM = {
    "rope_timm_dinov3": timm_eva(**TIMM_DINOV3, qkv_bias=False, num_classes=0, global_pool="token"),
    "rope_timm_dinov3_plus": timm_eva(**TIMM_DINOV3, swiglu_mlp=True, swiglu_align_to=8, global_pool="token"),
}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "rope_hf_dinov3": {},
    "rope_hf_dinov3_plus": {"use_gated_mlp": True, "hidden_act": "silu"},
}


def randomized(case: str, model: nn.Module) -> nn.Module:
    """Give a model's parameters random values; buffers keep theirs."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.from_numpy(peers.random_values(case, name, tuple(value.shape))))
    return model.eval()


def outputs(model: nn.Module, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    with torch.no_grad():
        result = model.double()(torch.from_numpy(images).double())
    if not isinstance(result, torch.Tensor):
        result = result.pooler_output
    return np.asarray(result.numpy())


def save(case: str, model: nn.Module) -> None:
    arrays = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    save_file(arrays, FOLDER / f"{case}.safetensors")


def timm_cases() -> Outputs:
    results: Outputs = {}
    for case, build in TIMM.items():
        model = randomized(case, build(IMAGE_SIZE))
        save(case, model)
        for label, size in (("", IMAGE_SIZE), ("other_", OTHER_SIZE)):
            images = peers.images(case + label, size)
            model.float().set_input_size(size)  # type: ignore[operator]
            results |= {f"{case}/{label}images": images, f"{case}/{label}logits": outputs(model, images)}
    return results


def huggingface_cases() -> Outputs:
    results: Outputs = {}
    for case, changed in (
        ("rope_hf_dinov3", {}),
        ("rope_hf_dinov3_plus", {"use_gated_mlp": True, "hidden_act": "silu"}),
    ):
        config = DINOv3ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            patch_size=PATCH,
            image_size=list(IMAGE_SIZE),
            num_register_tokens=4,
            **changed,
        )
        model = randomized(case, DINOv3ViTModel(config))
        shutil.rmtree(FOLDER / case, ignore_errors=True)
        model.save_pretrained(FOLDER / case)  # type: ignore[operator]
        content = json.loads((FOLDER / case / "config.json").read_text())
        peers.write_json(FOLDER / case / "config.json", content)
        for label, size in (("", IMAGE_SIZE), ("other_", OTHER_SIZE)):
            images = peers.images(case + label, size)
            results |= {f"{case}/{label}images": images, f"{case}/{label}logits": outputs(model, images)}
    return results


def import_from(folder: Path, name: str) -> types.ModuleType:
    """Import a module of a checkout, without keeping others of the same name."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def record_original(case: str, model: nn.Module, sizes: Mapping[str, tuple[int, int]]) -> Outputs:
    """Save a model of an authors' program, and return its output for each label and image size."""
    randomized(case, model)
    save(case, model)
    results: Outputs = {}
    for label, size in sizes.items():
        images = peers.images(case + label, size)
        results |= {f"{case}/{label}images": images, f"{case}/{label}logits": outputs(model, images)}
    return results


def dinov3_cases(folder: Path) -> Outputs:
    module = import_from(folder, "dinov3.models.vision_transformer")
    results: Outputs = {}
    for case, changed in (
        ("rope_dinov3", {"ffn_ratio": 1.5}),
        ("rope_dinov3_plus", {"ffn_ratio": 2.25, "ffn_layer": "swiglu", "untie_global_and_local_cls_norm": True}),
    ):
        model = module.DinoVisionTransformer(
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=1,
            num_heads=HEADS,
            pos_embed_rope_dtype="fp32",
            layerscale_init=1e-5,
            norm_layer="layernormbf16",
            n_storage_tokens=4,
            mask_k_bias=True,
            **changed,
        )
        model.init_weights()
        results |= record_original(case, model, {"": IMAGE_SIZE, "other_": OTHER_SIZE})
    return results


def main(dinov3: Path) -> None:
    torch.set_num_threads(1)
    golden.write(FOLDER / "rope.npz", timm_cases() | huggingface_cases() | dinov3_cases(dinov3))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

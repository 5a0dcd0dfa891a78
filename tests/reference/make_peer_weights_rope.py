"""Make files of weights/ and weights/rope.npz: small models with rotary positions or gated
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
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification, DINOv3ViTConfig, DINOv3ViTModel

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


def timm_vit(**changed: Any) -> Build:
    """Return a function that builds a model of timm's VisionTransformer class for an image size."""

    def build(size: tuple[int, int]) -> nn.Module:
        common: dict[str, Any] = {"embed_dim": WIDTH, "num_heads": HEADS, "patch_size": PATCH, "mlp_ratio": 1.5}
        return VisionTransformer(img_size=size, **common | {"depth": 1, "num_classes": NUM_CLASSES} | changed)

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
EVA02: dict[str, Any] = {"swiglu_mlp": True, "ref_feat_shape": (16, 16)}
ROPE_VIT: dict[str, Any] = {
    "attn_type": "rope",
    "init_values": 1e-5,
    "global_pool": "token",
    "rope_grid_indexing": "xy",
}
TIMM = {
    "timm_dinov3": timm_eva(**TIMM_DINOV3, qkv_bias=False, num_classes=0, global_pool="token"),
    "timm_dinov3_plus": timm_eva(**TIMM_DINOV3, swiglu_mlp=True, swiglu_align_to=8, global_pool="token"),
    "timm_eva02": timm_eva(**EVA02, qkv_fused=False, scale_mlp=True),
    "timm_eva02_clip": timm_eva(**EVA02, qkv_fused=False, scale_mlp=True, scale_attn_inner=True, global_pool="token"),
    "timm_eva02_small": timm_eva(**EVA02, num_classes=0),
    "timm_eva": timm_eva(use_rot_pos_emb=False),
    "timm_reg1_gap": timm_eva(
        init_values=1e-5, class_token=False, num_reg_tokens=1, use_abs_pos_emb=False, ref_feat_shape=(16, 16)
    ),
    "timm_axial": timm_eva(**ROPE_VIT, rope_temperature=100.0, use_abs_pos_emb=False),
    "timm_axial_ape": timm_eva(**ROPE_VIT, rope_temperature=100.0, no_embed_class=True),
    "timm_vit_norms": timm_vit(
        qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5)
    ),
    "timm_reg4_gap": timm_vit(
        class_token=False, no_embed_class=True, reg_tokens=4, global_pool="avg", init_values=1e-5, qkv_bias=False
    ),
    "timm_reg4_positions": timm_vit(reg_tokens=4),
    "timm_giant": timm_vit(
        init_values=1e-5, reg_tokens=4, no_embed_class=True, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=3.0
    ),
    "timm_mixed_ape": timm_eva(**ROPE_VIT, rope_temperature=10.0, rope_type="mixed", no_embed_class=True, depth=2),
}
HF_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "patch_size": PATCH,
}
HUGGING_FACE: dict[str, Callable[[], nn.Module]] = {
    "hf_dinov3": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**HF_SIZES, intermediate_size=HIDDEN, image_size=list(IMAGE_SIZE), num_register_tokens=4)
    ),
    "hf_dinov3_plus": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(
            **HF_SIZES,
            intermediate_size=HIDDEN,
            image_size=list(IMAGE_SIZE),
            num_register_tokens=4,
            use_gated_mlp=True,
            hidden_act="silu",
        )
    ),
    "hf_giant": lambda: Dinov2ForImageClassification(
        Dinov2Config(**HF_SIZES, mlp_ratio=2, image_size=SQUARE[0], use_swiglu_ffn=True, num_labels=NUM_CLASSES)
    ),
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
        result = result.logits if hasattr(result, "logits") else result.pooler_output
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
    for case, make in HUGGING_FACE.items():
        model = randomized(case, make())
        shutil.rmtree(FOLDER / case, ignore_errors=True)
        model.save_pretrained(FOLDER / case)  # type: ignore[operator]
        content = json.loads((FOLDER / case / "config.json").read_text())
        peers.write_json(FOLDER / case / "config.json", content)
        sizes = {"": SQUARE} if case == "hf_giant" else {"": IMAGE_SIZE, "other_": OTHER_SIZE}
        for label, size in sizes.items():
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
        ("dinov3", {"ffn_ratio": 1.5}),
        ("dinov3_plus", {"ffn_ratio": 2.25, "ffn_layer": "swiglu", "untie_global_and_local_cls_norm": True}),
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


class SwiGLU(nn.Module):
    """xformers' gated MLP, whose first layer holds the gate and the values."""

    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(in_features, 2 * hidden_features)
        self.w3 = nn.Linear(hidden_features, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, values = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * values)


def replace_modules_for_gpus() -> None:
    xops, normalization = types.ModuleType("xformers.ops"), types.ModuleType("apex.normalization")
    xops.SwiGLU, normalization.FusedLayerNorm = SwiGLU, nn.LayerNorm  # type: ignore[attr-defined]
    xformers, apex = types.ModuleType("xformers"), types.ModuleType("apex")
    xformers.ops, apex.normalization = xops, normalization  # type: ignore[attr-defined]
    sys.modules |= {"xformers": xformers, "xformers.ops": xops, "apex": apex, "apex.normalization": normalization}
    torch.Tensor.cuda = lambda self, *_: self  # type: ignore[method-assign,misc,assignment]


def eva02_cases(folder: Path) -> Outputs:
    module = import_from(folder / "EVA-02" / "asuka", "modeling_finetune")
    results: Outputs = {}
    for case, changed in (("eva02", {"subln": True, "naiveswiglu": True}), ("eva02_small", {"swiglu": True})):
        model = module.VisionTransformer(
            img_size=SQUARE[0],
            patch_size=PATCH,
            num_classes=NUM_CLASSES,
            embed_dim=WIDTH,
            depth=1,
            num_heads=HEADS,
            mlp_ratio=1.5,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_checkpoint=False,
            rope=True,
            pt_hw_seq_len=5,
            intp_freq=True,
            **changed,
        )
        results |= record_original(case, model, {"": SQUARE})
    return results


def rope_vit_cases(folder: Path) -> Outputs:
    module = import_from(folder, "models.vit_rope")
    model = module.rope_vit_models(
        rope_theta=10.0,
        rope_mixed=True,
        img_size=SQUARE[0],
        patch_size=PATCH,
        num_classes=NUM_CLASSES,
        embed_dim=WIDTH,
        depth=2,
        num_heads=HEADS,
        mlp_ratio=1.5,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        block_layers=module.RoPE_Layer_scale_init_Block,
        Attention_block=module.RoPEAttention,
    )
    return record_original("rope_vit_mixed", model, {"": SQUARE})


def vit5_cases(folder: Path) -> Outputs:
    module = import_from(folder, "models_vit5")
    model = module.vit_models(
        img_size=SQUARE[0],
        patch_size=PATCH,
        num_classes=NUM_CLASSES,
        embed_dim=WIDTH,
        depth=1,
        num_heads=HEADS,
        mlp_ratio=1.5,
        norm_layer=partial(module.RMSNorm, eps=1e-6),
        block_layers=module.Block,
        num_registers=4,
        flash=False,
        rope=True,
        reg_theta=100,
        qk_norm=True,
    )
    return record_original("rope_vit5", model, {"": SQUARE})


def main(dinov3: Path, eva: Path, rope_vit: Path, vit5: Path) -> None:
    torch.set_num_threads(1)
    replace_modules_for_gpus()
    results = timm_cases() | huggingface_cases() | dinov3_cases(dinov3)
    # Both have a module `rope`.
    results |= eva02_cases(eva)
    del sys.modules["rope"]
    golden.write(FOLDER / "rope.npz", results | rope_vit_cases(rope_vit) | vit5_cases(vit5))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

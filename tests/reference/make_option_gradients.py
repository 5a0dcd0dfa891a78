"""Make option_gradients.npz: every gradient of small models with rotary positions and other options, by timm.

Each case is a model of timm with images of 12x16 (height x width), patches of 4, width 24, 3 heads, an MLP of 48 hidden
channels and 5 classes; the loss is the mean softmax cross-entropy of 3 images, in float64. `CASES` has the options by
the keys of this program's config, in `OURS`, which the tests read, and by timm's arguments.

`CASE/logits` [3, 5], `CASE/loss` [], and `CASE/NAME` for the gradient of each parameter, with the names and the layout
of this program's files. Parameters, images and labels have closed forms (`closed_form.vit_parameter`, `images`,
`labels` here), so they aren't stored. timm pairs a head's channels 2 i and 2 i + 1 where this program pairs i and
i + d / 2, so the columns of the query and key projections are permuted.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import golden
import numpy as np
import numpy.typing as npt
import torch
from closed_form import uniform, vit_parameter
from option_cases import HEADS, IMAGE_SIZE, OURS, WIDTH, labels
from timm.layers import RmsNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

Tensors = dict[str, torch.Tensor]
COMMON: dict[str, Any] = {
    "img_size": IMAGE_SIZE,
    "patch_size": 4,
    "embed_dim": WIDTH,
    "num_heads": HEADS,
    "mlp_ratio": 2.0,
    "num_classes": 5,
    "global_pool": "token",
}
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
ROTARY = {"use_rot_pos_emb": True, "use_fc_norm": False, "norm_layer": LAYER_NORM}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "dinov3": lambda: Eva(
        **COMMON | ROTARY,
        depth=1,
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        init_values=0.5,
        rope_type="dinov3",
        rope_temperature=100.0,
        rope_rotate_half=True,
        swiglu_mlp=True,
        swiglu_align_to=8,
    ),
    "eva02": lambda: Eva(
        **COMMON | ROTARY,
        depth=1,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        ref_feat_shape=(4, 4),
    ),
    "mixed": lambda: Eva(
        **COMMON | ROTARY,
        depth=2,
        attn_type="rope",
        qk_norm=True,
        no_embed_class=True,
        rope_type="mixed",
        rope_grid_indexing="xy",
        rope_temperature=10.0,
    ),
    "rms": lambda: Eva(
        **COMMON | ROTARY | {"norm_layer": partial(RmsNorm, eps=1e-6)},
        depth=1,
        attn_type="rope",
        qk_norm=True,
        use_abs_pos_emb=False,
        rope_grid_indexing="xy",
        rope_temperature=100.0,
    ),
    "siglip": lambda: VisionTransformer(
        **COMMON | {"global_pool": "map"}, depth=1, class_token=False, act_layer="gelu_tanh", norm_layer=LAYER_NORM
    ),
    "clip": lambda: VisionTransformer(
        **COMMON, depth=1, pre_norm=True, act_layer="quick_gelu", norm_layer=partial(nn.LayerNorm, eps=1e-5)
    ),
}


def order_of_channels(case: str) -> npt.NDArray[np.int64]:
    """Return which of our channels of a head each of timm's is."""
    half = WIDTH // HEADS // 2
    pairs = np.arange(half)
    if case == "rms":  # the column's pairs come first
        pairs = (pairs + half // 2) % half
    if case == "dinov3":  # the same pairs
        return np.concatenate([pairs, pairs + half])
    return np.stack([pairs, pairs + half], axis=1).reshape(-1)


def reordered(weight: torch.Tensor, order: npt.NDArray[np.int64]) -> torch.Tensor:
    """Permute the channels of each head, on the last axis."""
    heads = weight.reshape(*weight.shape[:-1], -1, len(order))
    return heads[..., torch.from_numpy(order)].reshape(weight.shape)


def to_timm(ours: Tensors, case: str) -> Tensors:
    """Return timm's parameters from ours; autograd follows back."""
    theirs: Tensors = {}
    order = order_of_channels(case)
    frequencies = []
    for name, value in ours.items():
        if ".attn.qkv." in name:
            query, key, value = value.chunk(3, dim=-1)
            if case not in ("siglip", "clip"):
                query, key = reordered(query, order), reordered(key, order)
            parts = {"q": query, "k": key, "v": value}
            block = name.rpartition(".qkv.")[0]
            is_weight = name.endswith(".weight")
            if block == "attn_pool.attn":
                kind = name.rpartition(".")[2]
                theirs[f"attn_pool.q.{kind}"] = query.T if is_weight else query
                both = torch.cat([key, value], dim=-1)
                theirs[f"attn_pool.kv.{kind}"] = both.T if is_weight else both
            elif case == "eva02":
                theirs |= {f"{block}.{part}_proj.weight": value.T for part, value in parts.items()}
            else:
                fused = torch.cat([query, key, value], dim=-1)
                theirs[name] = fused.T if is_weight else fused
        elif name.endswith((".attn.q.bias", ".attn.v.bias")):
            block, part = name.removesuffix(".bias").rsplit(".", 1)
            value = reordered(value, order) if part == "q" else value
            theirs[f"{block}.{part}_proj.bias" if case == "eva02" else f"{block}.{part}_bias"] = value
        elif name.endswith((".q_norm.weight", ".k_norm.weight", ".q_norm.bias", ".k_norm.bias")):
            theirs[name] = reordered(value, order)
        elif name.endswith(".rope.frequencies"):
            # theirs: of columns (x), then of rows
            frequencies.append(value.flip(0).reshape(2, HEADS, -1))
        else:
            theirs[timm_name(name)] = value.T if value.ndim == 2 and name.endswith(".weight") else value
    if frequencies:
        theirs["rope.freqs"] = torch.stack(frequencies, dim=1)
    return theirs


def timm_name(name: str) -> str:
    """Return timm's name of a parameter that has one of its own."""
    for ours, theirs in {
        ".mlp.gate.": ".mlp.fc1_g.",
        ".ls1.gamma": ".gamma_1",
        ".ls2.gamma": ".gamma_2",
        "attn_pool.attn.proj.": "attn_pool.proj.",
    }.items():
        name = name.replace(ours, theirs)
    return name


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    images = torch.from_numpy(uniform("images", (3, 3, *IMAGE_SIZE)).astype(np.float64))
    arrays: dict[str, npt.ArrayLike] = {}
    for case, build in MODELS.items():
        model = build().eval()
        expected = dict(model.named_parameters())
        ours = {
            name: torch.from_numpy(vit_parameter(name, shape).astype(np.float64)).requires_grad_()
            for name, shape in OURS[case]["shapes"].items()
        }
        theirs = to_timm(ours, case)
        if case in ("dinov3", "eva02"):
            theirs = {name.replace(".mlp.fc1.", ".mlp.fc1_x."): value for name, value in theirs.items()}
        assert theirs.keys() == expected.keys(), (case, theirs.keys() ^ expected.keys())
        assert all(theirs[name].shape == expected[name].shape for name in theirs), case
        logits = torch.func.functional_call(model, theirs, (images,))
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels()))
        loss.backward()  # type: ignore[no-untyped-call]
        arrays |= {f"{case}/logits": logits.detach().numpy(), f"{case}/loss": loss.detach().numpy()}
        for name, value in ours.items():
            assert value.grad is not None, name
            arrays[f"{case}/{name}"] = value.grad.numpy()
    golden.write(Path(__file__).with_name("option_gradients.npz"), arrays)


if __name__ == "__main__":
    main()

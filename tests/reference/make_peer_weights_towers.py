"""Make the files of image towers that were trained with texts: weights/timm_clip/, timm_siglip.safetensors, open_clip/,
openai_clip.safetensors, hf_clip*/, hf_siglip*/ and weights/towers.npz.

As in weights/torch.npz: random weights, width 20, 4 heads, mlp_dim 36, patches of 4, one block if nothing else is said;
for each case `CASE/images` [2, 3, height, width] and `CASE/logits` in float64, which are the features of a model
without a head and the projected features of one with a projection.

- timm_siglip: no class token, attention pooling, 7 classes, 12x20 pixels
- timm_clip: a norm before the first block, quick GELU, epsilon 1e-5, 7 classes, 12x20 pixels; with config.json
- open_clip: CLIP with two blocks, LayerScale and a text tower, 12x20 pixels; open_clip_config.json has GELU and heads
- openai_clip: CLIP with quick GELU and the three entries that only OpenAI's own files have
- eva_clip: the image tower of EVA-02's authors (EVA-CLIP/rei), width 16, 2 heads, mlp_dim 24, with arrays of texts
- hf_clip: CLIPModel with both towers, quick GELU
- hf_clip_vision: CLIPVisionModel with exact GELU
- hf_clip_projection: CLIPVisionModelWithProjection
- hf_siglip: SiglipModel with both towers
- hf_siglip_classifier: SiglipForImageClassification, which reads the mean of the patches
- hf_siglip2_naflex: Siglip2VisionModel, which gets patches instead of an image

Run with a checkout of https://github.com/baaivision/EVA; it needs einops. With `--check FOLDER`, the script makes
nothing, but loads the files in it that write_towers.py wrote into these programs, strictly, and compares what they
compute.
"""

import argparse
import importlib
import json
import shutil
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import peer_weights as peers
import torch
from make_peer_weights_torch import randomized
from peer_weights import FOLDER, HEADS, IMAGE_SIZE, MLP_DIM, NUM_CLASSES, PATCH, SQUARE, WIDTH
from safetensors.torch import load_file, save_file
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionModel,
)

PROJECTION, EVA_WIDTH = 7, 16
VISION = {"hidden_size": WIDTH, "intermediate_size": MLP_DIM, "num_hidden_layers": 1, "num_attention_heads": HEADS}
VISION |= {"image_size": SQUARE[0], "patch_size": PATCH}
TEXT = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 6}
TEXT |= {"max_position_embeddings": 5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
NAFLEX = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 9}

TIMM = {
    "timm_siglip": {"class_token": False, "global_pool": "map"},
    "timm_clip": {"pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5), "act_layer": "quick_gelu"},
}
OPEN_CLIP_MODEL = {
    "embed_dim": PROJECTION,
    "vision_cfg": {
        "image_size": list(IMAGE_SIZE),
        "layers": 2,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "mlp_ratio": MLP_DIM / WIDTH,
        "patch_size": PATCH,
        "ls_init_value": 1e-5,
    },
    "text_cfg": {"context_length": 5, "vocab_size": 6, "width": 8, "heads": 2, "layers": 1},
    "quick_gelu": False,
}
OPENAI_MODEL = OPEN_CLIP_MODEL | {
    "vision_cfg": OPEN_CLIP_MODEL["vision_cfg"] | {"image_size": SQUARE[0], "layers": 1, "ls_init_value": None},
    "quick_gelu": True,
}
HUGGING_FACE: dict[str, Callable[[], nn.Module]] = {
    "hf_clip": lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=PROJECTION)),
    "hf_clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION, hidden_act="gelu")),
    "hf_clip_projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=PROJECTION)),
    "hf_siglip": lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT | {"projection_size": WIDTH})),
    "hf_siglip_classifier": lambda: SiglipForImageClassification(
        SiglipConfig(vision_config=VISION, text_config=TEXT, num_labels=NUM_CLASSES)
    ),
    "hf_siglip2_naflex": lambda: Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX)),
}


def timm_model(case: str) -> VisionTransformer:
    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=1,
        num_heads=HEADS,
        mlp_ratio=MLP_DIM / WIDTH,
        num_classes=NUM_CLASSES,
        **TIMM[case],
    )


def open_clip_model(settings: dict[str, Any]) -> nn.Module:
    text = open_clip.CLIPTextCfg(**settings["text_cfg"])
    vision = open_clip.CLIPVisionCfg(**settings["vision_cfg"])
    return open_clip.CLIP(settings["embed_dim"], vision, text, quick_gelu=settings["quick_gelu"])


def outputs(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Compute logits, projected features or features in float64."""
    model = model.double().eval()
    pixels = torch.from_numpy(images).double()
    with torch.no_grad():
        if isinstance(model, Siglip2VisionModel):
            num_images, channels, height, width = pixels.shape
            rows, columns = height // PATCH, width // PATCH
            patches = pixels.reshape(num_images, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1)
            patches = patches.reshape(num_images, rows * columns, -1)  # [B, N, p p 3]
            mask = torch.ones(patches.shape[:2], dtype=torch.int64)
            result = model(patches, mask, torch.tensor([[rows, columns]] * num_images)).pooler_output
        elif isinstance(model, open_clip.CLIP):
            result = model.encode_image(pixels)
        elif isinstance(model, CLIPModel):
            result = model.visual_projection(model.vision_model(pixels).pooler_output)
        elif isinstance(model, SiglipModel):
            result = model.vision_model(pixels).pooler_output
        else:
            result = model(pixels)
        if not isinstance(result, torch.Tensor):
            names = ("image_embeds", "logits", "pooler_output")
            result = next(getattr(result, name) for name in names if getattr(result, name, None) is not None)
    return result.numpy()


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("eva", nargs="?", type=Path)
    choice.add_argument("--check", type=Path)
    arguments = parser.parse_args()
    make(arguments.eva) if arguments.check is None else check(arguments.check)


def eva_clip_model(checkout: Path) -> nn.Module:
    """Return the authors' tower without xformers' kernels, which compute the same."""
    package = types.ModuleType("eva_clip")
    package.__path__ = [str(checkout / "EVA-CLIP/rei/eva_clip")]
    sys.modules["eva_clip"] = package  # so that its __init__ isn't run, which needs more packages
    tower = importlib.import_module("eva_clip.eva_vit_model").EVAVisionTransformer
    return tower(
        img_size=SQUARE[0],
        patch_size=PATCH,
        num_classes=PROJECTION,
        embed_dim=EVA_WIDTH,
        depth=1,
        num_heads=2,
        mlp_ratio=1.5,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_mean_pooling=False,
        rope=True,
        intp_freq=True,
        naiveswiglu=True,
        subln=True,
    )


def make(eva: Path) -> None:
    results = {}
    for case in TIMM:
        model = randomized(case, timm_model(case))
        path = FOLDER / f"{case}.safetensors"
        if case == "timm_clip":
            path = FOLDER / case / "model.safetensors"
            path.parent.mkdir(exist_ok=True)
            config = {"architecture": "vit_base_patch16_clip_quickgelu_224", "num_classes": NUM_CLASSES}
            peers.write_json(path.with_name("config.json"), config)
        save_file(model.state_dict(), path)
        results[case] = (peers.images(case, IMAGE_SIZE), model)
    model = randomized("open_clip", open_clip_model(OPEN_CLIP_MODEL))
    (FOLDER / "open_clip").mkdir(exist_ok=True)
    save_file(model.state_dict(), FOLDER / "open_clip" / "open_clip_model.safetensors")
    peers.write_json(FOLDER / "open_clip" / "open_clip_config.json", {"model_cfg": OPEN_CLIP_MODEL})
    results["open_clip"] = (peers.images("open_clip", IMAGE_SIZE), model)
    model = randomized("openai_clip", open_clip_model(OPENAI_MODEL))
    entries = {"input_resolution": SQUARE[0], "context_length": 5, "vocab_size": 6}
    state = model.state_dict() | {name: torch.tensor(value) for name, value in entries.items()}
    save_file(state, FOLDER / "openai_clip.safetensors")
    results["openai_clip"] = (peers.images("openai_clip", SQUARE), model)
    model = eva_clip_model(eva)
    tables = {name: value.clone() for name, value in model.state_dict().items() if "rope.freqs" in name}
    randomized("eva_clip", model).load_state_dict(tables, strict=False)
    state = {f"visual.{name}": value.clone() for name, value in model.state_dict().items()}
    texts = {"logit_scale": (), "text.token_embedding.weight": (6, 8), "text.text_projection": (8, PROJECTION)}
    state |= {name: torch.tensor(peers.random_values("eva_clip", name, shape)) for name, shape in texts.items()}
    save_file(state, FOLDER / "eva_clip.safetensors")
    results["eva_clip"] = (peers.images("eva_clip", SQUARE), model)
    for case, make_model in HUGGING_FACE.items():
        model = randomized(case, make_model())
        shutil.rmtree(FOLDER / case, ignore_errors=True)
        model.save_pretrained(FOLDER / case)
        config = json.loads((FOLDER / case / "config.json").read_text())
        peers.write_json(FOLDER / case / "config.json", config)
        results[case] = (peers.images(case, SQUARE), model)
    peers.record({case: (images, outputs(model, images)) for case, (images, model) in results.items()}, "towers.npz")


def check(folder: Path) -> None:
    """Load each written file strictly and compare its outputs with those that were recorded for its original."""
    recorded = np.load(FOLDER / "towers.npz")
    for path in sorted(folder.iterdir()):
        case, _, to = path.name.partition("@")
        if case == "eva_clip":
            continue  # timm's Eva class: make_peer_weights_rope.py
        images = recorded[f"{case}/images"]
        if to == "huggingface":
            config = json.loads((path / "config.json").read_text())
            kinds = (CLIPVisionModel, CLIPVisionModelWithProjection, SiglipVisionModel, SiglipForImageClassification)
            kind = next(kind for kind in kinds if config["architectures"] == [kind.__name__])
            model, report = kind.from_pretrained(path, output_loading_info=True)
            assert not any(report.values()), report
        else:
            make = written_timm_model if to == "timm" else written_open_clip_model
            model = make(path / "model.safetensors", images.shape[2:])
        difference = np.abs(outputs(model, images) - recorded[f"{case}/logits"]).max()
        print(f"{path.name}: {difference:.1e}")
        assert difference < 1e-5, path


def read_record(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header of a .safetensors file, and this program's record of the model in it."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header, json.loads(header["__metadata__"]["vit_static_model"])


def written_open_clip_model(path: Path, image_size: tuple[int, int]) -> nn.Module:
    """Return OpenCLIP's model with the image tower of a file; its text tower is new."""
    _, record = read_record(path)
    changed = {"image_size": image_size, "layers": record["depth"], "ls_init_value": record["layer_scale_init"]}
    vision = OPEN_CLIP_MODEL["vision_cfg"] | changed
    model = open_clip_model(OPEN_CLIP_MODEL | {"vision_cfg": vision, "quick_gelu": record["gelu"] == "quick"})
    tower = {name.removeprefix("visual."): value for name, value in load_file(path).items()}
    if "proj" not in tower:
        model.visual.proj = None
    model.visual.load_state_dict(tower)
    return model


def written_timm_model(path: Path, image_size: tuple[int, int]) -> nn.Module:
    """Return timm's model for a file, with the sizes and options of the record."""
    header, record = read_record(path)
    acts = {"erf": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}
    pools = {"cls": "token", "gap": "avg", "map": "map"}
    model = VisionTransformer(
        img_size=image_size,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=record["depth"],
        num_heads=HEADS,
        mlp_ratio=MLP_DIM / WIDTH,
        num_classes=record["num_classes"],
        class_token="cls_token" in header,
        global_pool=pools[record["pool"]],
        fc_norm=False,
        init_values=record["layer_scale_init"],
        pre_norm=record["pre_norm"],
        norm_layer=partial(LayerNorm, eps=record["layer_norm_epsilon"]),
        act_layer=acts[record["gelu"]],
    )
    model.load_state_dict(load_file(path))
    return model


if __name__ == "__main__":
    main()

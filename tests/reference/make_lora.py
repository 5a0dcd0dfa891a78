"""Make lora/: 20 steps of peft's LoRA on Hugging Face's ViT in float64, and peft's adapters of a ViT of timm.

lora/training.npz: with Hugging Face's ViT of `hf` (model.safetensors and config.json), whose queries, keys and values
are layers of their own. All linear layers of the blocks have adapters of rank 4 with alpha 6; these and the head are
trained by torch's AdamW (betas 0.9 and 0.999, epsilon 1e-8, weight decay 0.05 of all of them, learning rate 5e-3) with
clip_grad_norm_ to 2.0. Step n has the images and labels of `batch(n)`, which tests draw in the same way.

- `losses` [20], `grad_norms` [20] before clipping; `merged_logits` [8, 5] of batch(20) after training
- `initial/NAME`, `final/NAME`: the adapters and the head before the first and after the last step, by this program's
  names and in its layout: lora_a [inputs, rank], lora_b [rank, outputs], head.weight [inputs, outputs]. B starts at
  random, not at zero, so that A has a gradient from the first step on.

lora/peft: base.safetensors, a ViT of timm, and peft's adapters of its attention and MLP with a head of their own, as
`save_pretrained` writes them: adapter_model.safetensors, adapter_config.json (with a pattern of ranks and alphas);
`logits.npz` has their `logits` [8, 5] for batch(0).

Inputs are exact in float32; results are float64 rounded to float32.
"""

import json
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

FOLDER = Path(__file__).parent / "lora"
NUM_STEPS, BATCH_SIZE, SIDE, NUM_CLASSES = 20, 8, 16, 5
WIDTH, MLP_DIM, RANK, ALPHA = 24, 40, 4, 6.0
NAMES = {
    **{f"attention.{part}_proj": f"attn.{part}" for part in "qkv"},
    **{"attention.o_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
}


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normally distributed images [8, 3, 16, 16] and uniformly distributed labels [8]."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((BATCH_SIZE, 3, SIDE, SIDE)).astype(np.float32)
    return torch.tensor(images).double(), torch.tensor(rng.integers(0, NUM_CLASSES, BATCH_SIZE))


def randomize(model: torch.nn.Module, seed: int, names: str = "") -> None:
    """Draw the parameters whose names contain `names`, exact in float32."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            value = (0.15 * rng.standard_normal(tuple(parameter.shape))).astype(np.float32)
            if names in name:
                parameter.copy_(torch.tensor(value + ("norm" in name and name.endswith("weight"))))


def our_name(name: str) -> str:
    """Return this program's name of a trained parameter of peft's model of Hugging Face's ViT."""
    if ".classifier." in name:
        return f"head.{name.rpartition('.')[2]}"
    _, _, index, *layer, matrix, _, _ = name.removeprefix("base_model.model.").split(".")
    return f"blocks.{index}.{NAMES['.'.join(layer)]}.{matrix.lower()}"


def trained_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the trained parameters by this program's names and in its layout, float32."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            array = parameter.detach().numpy()
            state[our_name(name)] = (array.T if array.ndim == 2 else array).astype(np.float32)
    return state


def make_training() -> None:
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=3, intermediate_size=MLP_DIM, image_size=SIDE,
        patch_size=8, num_labels=NUM_CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    base = ViTForImageClassification(config).double()
    randomize(base, 1)
    base.float().save_pretrained(FOLDER / "hf")
    (FOLDER / "hf" / "config.json").write_text(json.dumps(json.loads((FOLDER / "hf" / "config.json").read_text())))
    targets = [name for name, layer in base.named_modules() if isinstance(layer, torch.nn.Linear)]
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[name for name in targets if name != "classifier"],
        modules_to_save=["classifier"],
    )  # fmt: skip
    model = get_peft_model(base.double(), lora).double()
    randomize(model, 2, "lora_")
    arrays = {f"initial/{name}": value for name, value in trained_state(model).items()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(arrays) == len(parameters) == 2 * 6 * 2 + 2
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    losses, norms = [], []
    model.train()
    for step in range(NUM_STEPS):
        images, labels = batch(step)
        loss = F.cross_entropy(model(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 2.0)))
        optimizer.step()
        losses.append(loss.item())
    arrays |= {f"final/{name}": value for name, value in trained_state(model).items()}
    with torch.no_grad():
        logits = model.merge_and_unload().eval()(batch(NUM_STEPS)[0]).logits.numpy()
    summary = {"losses": np.array(losses), "grad_norms": np.array(norms), "merged_logits": logits}
    np.savez(FOLDER / "training.npz", **arrays, **{name: value.astype(np.float32) for name, value in summary.items()})


def make_adapters() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=3, mlp_ratio=2,
        num_classes=NUM_CLASSES,
    ).double()  # fmt: skip
    randomize(model, 3)
    (FOLDER / "peft").mkdir(parents=True, exist_ok=True)
    save_file({k: v.float().contiguous() for k, v in model.state_dict().items()}, FOLDER / "peft" / "base.safetensors")
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["attn.qkv", "attn.proj", "mlp.fc1"], modules_to_save=["head"],
        rank_pattern={"mlp.fc1": 2}, alpha_pattern={"attn.qkv": 3.0}, base_model_name_or_path="base.safetensors",
    )  # fmt: skip
    adapted = get_peft_model(model, lora).double()
    randomize(adapted, 4, "lora_")
    randomize(adapted, 5, "modules_to_save")
    with torch.no_grad():
        logits = adapted.eval()(batch(0)[0]).numpy()
    adapted.float().save_pretrained(FOLDER / "peft")
    (FOLDER / "peft" / "README.md").unlink(missing_ok=True)
    np.savez(FOLDER / "peft" / "logits.npz", logits=logits.astype(np.float32))


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    make_training()
    make_adapters()
